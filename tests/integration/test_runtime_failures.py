"""Every step of create and start is broken on purpose, by an error and by death: one sentence, and nothing is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from runtime.init import STEPS
from tests.bundles import Bundle, Bundles, bundles
from tests.seccomp_agent import Agent, let_go
from tests.support import SOON_S, eventually, needs

CREATE = ("reserved", "noted", "cgroup", "cloned", "ready", "saved")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def everything(home: Bundles) -> Bundle:
    """A container for which every step has something to do that is possible on any machine."""
    one = home.sh("exit 0")
    hook = [{"path": "/bin/true", "args": ["true"]}]
    one.config["hooks"] = dict.fromkeys(("createRuntime", "createContainer"), hook)
    one.linux["sysctl"] = {"net.ipv4.ip_forward": "1"}
    one.process["terminal"] = True
    one.process["scheduler"] = {"policy": "SCHED_BATCH"}
    return one


def run_with(one: Bundle, failpoint: str) -> tuple[int, str]:
    """`ocirun run` in a terminal of its own."""
    one.write()
    result = one.home.ocirun("run", "--bundle", str(one.path), one.id, env={"OCID_FAILPOINTS": failpoint})
    return result.code, result.error


@pytest.mark.parametrize("action", ["error", "kill"])
@pytest.mark.parametrize(
    "step", [step.name for step in STEPS if step.name not in ("user namespace", "namespaces", "labels")]
)
def test_o37_a_failing_step_of_the_init_is_named_and_leaves_nothing(home: Bundles, step: str, action: str) -> None:
    one = everything(home)
    with Agent(home.directory / "agent", let_go) as agent:
        rules = [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]
        listener = {"listenerPath": str(agent.path)}
        one.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules, **listener}
        code, said = run_with(one, f"init.{step}={action}")
        assert code == 1, said
        assert (
            (f"failpoint init.{step}: error" in said)
            if action == "error"
            else (f"ended in step {step}: it exited with status 137" in said)
        ), said
        one.gone()
        assert agent.states == []
        assert run_with(one, "") == (0, "")
        one.gone()


@pytest.mark.parametrize("where", CREATE)
def test_o37_a_failing_create_leaves_nothing(home: Bundles, where: str) -> None:
    one = everything(home)
    code, said = run_with(one, f"create.{where}=error")
    assert code == 1 and f"failpoint create.{where}: error" in said
    one.gone()
    assert run_with(one, "") == (0, "")


@pytest.mark.parametrize("where", [*(f"create.{name}" for name in CREATE), "cgroup.made", "start.accepted"])
def test_o37_after_a_killed_create_delete_force_takes_everything(home: Bundles, where: str) -> None:
    one = home.make()
    one.linux["cgroupsPath"] = f"/{home.cgroup}/of-another-name"
    code, _ = run_with(one, f"{where}=kill")
    assert code == -9
    known = home.ocirun("state", one.id)
    assert known.code == 0 or "was never completely created" in known.error
    home.ocirun("list").ok()
    assert one.create().code == 1, "the id is taken"
    if where != "start.accepted":  # by then the container lives: it was started
        eventually(lambda: home.ocirun("state", one.id).code or one.status() == "stopped", what="the init to end")
    one.delete().ok()
    assert home.cgroups() == []
    one.gone()
    one.up().delete().ok()


def test_o37_delete_force_of_a_half_made_container_spares_a_foreign_cgroup(home: Bundles) -> None:
    other = home.make().up()
    one = home.make()
    one.linux["cgroupsPath"] = other.linux["cgroupsPath"]
    code, said = run_with(one, "create.reserved=kill")
    assert code == -9
    one.delete().ok()
    one.create().failed("it holds process")
    assert other.status() == "running" and home.cgroups(other.id)
    code, _ = run_with(one, "create.noted=kill")
    one.delete().ok()
    assert other.status() == "running" and home.cgroups(other.id)


def test_o37_a_delete_that_is_killed_goes_on_from_there(home: Bundles) -> None:
    one = home.make().up()
    killed = home.ocirun("delete", "--force", one.id, env={"OCID_FAILPOINTS": "delete.cgroup=kill"})
    assert killed.code == -9 and home.cgroups(one.id) == []
    assert one.status() == "stopped"
    one.delete(force=False).ok()
    one.gone()


@pytest.mark.parametrize("action", ["error", "kill"])
def test_a_failing_exec_leaves_no_process(home: Bundles, action: str) -> None:
    one = home.make().up()
    before = home.processes(one.id)
    result = one.exec("sleep", "1000", env={"OCID_FAILPOINTS": f"exec.cloned={action}"})
    assert result.code == (1 if action == "error" else -9)
    eventually(lambda: home.processes(one.id) == before, what="the half-made exec to end")
    one.exec("true").ok()


def test_an_exec_into_a_container_that_ends_meanwhile_says_so(home: Bundles, tmp_path: Path) -> None:
    one = home.make().up()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    before = home.processes(one.id)
    child = home.popen("exec", one.id, "true", env={"OCID_FAILPOINTS": f"exec.cloned=pause:{fifo}"}, stderr=PIPE)
    eventually(lambda: len(home.processes(one.id)) > len(before), what="the exec to be on its way")
    os.kill(one.pid(), signal.SIGKILL)
    with open(fifo, "wb"):
        _, said = child.communicate(timeout=SOON_S)
    assert child.returncode == 255 and b"cannot exec in a stopped container" in said, said


def test_state_that_is_damaged_is_said_and_can_be_deleted(home: Bundles) -> None:
    for raw in (b"", b"{", b"[]", b'{"id": 5}', b'{"id": "x"}'):
        one = home.make().up()
        (home.root / one.id / "state.json").write_bytes(raw)
        home.ocirun("state", one.id).failed("state.json")
        assert home.ocirun("list", "-q").ok() == ""
        one.delete(force=False).failed("state.json")
        one.delete().ok()
        one.gone()


def test_an_unwritable_state_directory_is_one_sentence(home: Bundles) -> None:
    one = home.make()
    home.root.write_text("a file where a directory should be")
    assert "Traceback" not in one.run().failed(str(home.root))
    home.root.unlink()
    one.run("--pid-file", "/no/such/directory/pid").failed("/no/such/directory")
    one.gone()


def test_a_label_that_the_kernel_cannot_give_is_an_error(home: Bundles) -> None:
    """Where there is AppArmor, tests/vm/test_apparmor.py shows that labels are given."""
    switch = Path("/sys/module/apparmor/parameters/enabled")
    on = switch.exists() and switch.read_text() == "Y\n"
    hint = "no such profile is loaded" if on else "AppArmor is not on in this kernel"
    one = home.make()
    one.process["apparmorProfile"] = "ocid-nobody-has-it"
    assert hint in one.create().failed("process.apparmorProfile: apply ocid-nobody-has-it")
    one.gone()
    del one.process["apparmorProfile"]
    one.up()
    assert hint in one.exec("true", flags=("--apparmor", "ocid-nobody-has-it")).failed("process.apparmorProfile")
    one.delete().ok()
    one.gone()
