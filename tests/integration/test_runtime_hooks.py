"""All six kinds of hooks: when and where they run, what they are told, and what becomes of it when one fails."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import OCIRUN, Bundle, Bundles, bundles
from tests.support import eventually, needs

KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
ours = pytest.mark.skipif(Path(OCIRUN).name == "runc", reason="the reference on this machine is older, or does less")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def hook(script: str, **more: Any) -> list[dict[str, Any]]:
    return [{"path": "/bin/sh", "args": ["sh", "-c", script], **more}]


def recorder(home: Bundles, one: Bundle, kind: str) -> list[dict[str, Any]]:
    """A hook that writes what it sees: into the host's directory, or into the container's /tmp for startContainer."""
    place = "/tmp" if kind == "startContainer" else str(home.directory)
    return hook(
        f"cat > {place}/{kind}.state; for n in mnt net; do readlink /proc/self/ns/$n; done > {place}/{kind}.ns; "
        f"pwd > {place}/{kind}.cwd; env > {place}/{kind}.env; ls /proc/self/fd > {place}/{kind}.fds"
    )


def seen(home: Bundles, one: Bundle, kind: str, what: str) -> str:
    place = one.rootfs / "tmp" if kind == "startContainer" else home.directory
    return (place / f"{kind}.{what}").read_text()


def test_each_hook_runs_where_and_when_it_should(home: Bundles) -> None:
    one = home.make()
    one.config["annotations"] = {"org.example": "x"}
    one.process["env"] = ["PATH=/bin", "FROM=container"]
    one.config["hooks"] = {kind: recorder(home, one, kind) for kind in KINDS}
    one.create(env={"FROM": "caller"}).ok()
    pid = one.pid()
    there = {kind for kind in KINDS if (home.directory / f"{kind}.state").exists()}
    early = {"poststart"} if Path(OCIRUN).name == "runc" else set()  # the reference runs it in create
    assert there == {"prestart", "createRuntime", "createContainer"} | early
    assert not (one.rootfs / "tmp/startContainer.state").exists()
    one.start().ok()
    assert (one.rootfs / "tmp/startContainer.state").exists() and (home.directory / "poststart.state").exists()
    inside = [os.readlink(f"/proc/{pid}/ns/{name}") for name in ("mnt", "net")]
    outside = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net")]
    home.ocirun("kill", one.id, "KILL").ok()
    one.becomes("stopped")
    assert not (home.directory / "poststop.state").exists()
    one.delete(force=False).ok()
    told = {"prestart": "creating", "createRuntime": "creating", "createContainer": "creating",
            "startContainer": "created", "poststart": "created" if early else "running",
            "poststop": "stopped"}  # fmt: skip
    for kind in KINDS:
        state = json.loads(seen(home, one, kind, "state"))
        assert state["id"] == one.id and state["bundle"] == str(one.path), kind
        assert state["status"] == told[kind] and state["annotations"] == {"org.example": "x"}, kind
        in_container = kind in ("createContainer", "startContainer")
        assert seen(home, one, kind, "ns").split() == (inside if in_container else outside), kind
        assert state.get("pid", 0) == (0 if kind == "poststop" else 1 if in_container else pid), kind
        if not early:  # the reference hands some of its own on
            assert set(seen(home, one, kind, "fds").split()) <= {"0", "1", "2", "3"}, kind  # 3 is ls's
    assert seen(home, one, "createContainer", "cwd") == f"{one.rootfs}\n"
    assert seen(home, one, "startContainer", "cwd") == "/\n"
    assert "FROM=container\n" in seen(home, one, "createContainer", "env")
    assert "FROM=container\n" in seen(home, one, "startContainer", "env")
    assert "FROM=caller\n" in seen(home, one, "prestart", "env")
    assert "FROM=caller\n" in seen(home, one, "createRuntime", "env")


def test_hooks_of_all_kinds_run_in_order(home: Bundles) -> None:
    one = home.make("sh", "-c", "echo process >> /trace/log")
    trace = home.directory / "trace"
    trace.mkdir()
    one.mount("/trace", "bind", trace, "bind", "rw")
    one.config["hooks"] = {
        kind: [hook(f"echo {kind}{n} >> {'/trace' if kind == 'startContainer' else trace}/log")[0] for n in (1, 2)]
        for kind in KINDS
    }
    one.create().ok()
    one.start().ok()
    one.becomes("stopped")
    one.delete(force=False).ok()
    lines = (trace / "log").read_text().split()
    before = [f"{kind}{n}" for kind in KINDS[:4] for n in (1, 2)]
    assert [line for line in lines if line in before] == before
    if Path(OCIRUN).name != "runc":
        # poststart comes after execve, so beside the process.
        assert set(lines[8:11]) == {"process", "poststart1", "poststart2"}
    assert lines[-2:] == ["poststop1", "poststop2"] and len(lines) == 13


def test_the_environment_of_a_hook_is_its_own_where_it_has_one(home: Bundles) -> None:
    one = home.make("true")
    out = home.directory / "env"
    one.config["hooks"] = {"createRuntime": hook(f"env > {out}", env=["A=b=c", "PATH=/bin:/usr/bin"])}
    one.run(env={"FROM": "caller"}).ok()
    assert "A=b=c\n" in out.read_text() and "FROM" not in out.read_text()


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
def test_a_hook_that_fails_in_create_undoes_it(home: Bundles, kind: str) -> None:
    one = home.make()
    trace = home.directory / "trace"
    one.config["hooks"] = {
        kind: [*hook("echo bad luck >&2; exit 3"), *hook(f"echo second >> {trace}")],
        "poststop": hook(f"cat >> {trace}"),
    }
    said = one.create().failed("exit status 3", code=1)
    assert "bad luck" in said and "error running" in said
    if Path(OCIRUN).name != "runc":
        assert f"error running {kind} hook #0: /bin/sh" in said
    one.gone()
    state = json.loads(trace.read_text())  # the lifecycle goes on with poststop, and the second hook never ran
    assert state["status"] == "stopped" and state["id"] == one.id and not state.get("pid")
    home.ocirun("state", one.id).failed("container does not exist")


def test_a_failing_start_container_hook_ends_the_container(home: Bundles) -> None:
    one = home.sh("touch /tmp/ran; sleep 1000")
    one.config["hooks"] = {"startContainer": hook("exit 4"), "poststop": hook(f"touch {home.directory}/poststop")}
    one.create().ok()
    # The reference does not see that the process never came to its execve.
    if Path(OCIRUN).name == "runc":
        one.start()
    else:
        one.start().failed("error running startContainer hook #0: /bin/sh: exit status 4", code=1)
    one.becomes("stopped")
    assert not (one.rootfs / "tmp/ran").exists()
    one.delete(force=False).ok()
    assert (home.directory / "poststop").exists()
    one.gone()


@ours
def test_a_failing_poststart_hook_stops_the_container(home: Bundles) -> None:
    one = home.make()
    one.config["hooks"] = {"poststart": hook("exit 5"), "poststop": hook(f"touch {home.directory}/poststop")}
    one.create().ok()
    one.start().failed("error running poststart hook #0: /bin/sh: exit status 5", code=1)
    one.becomes("stopped")
    one.delete(force=False).ok()
    assert (home.directory / "poststop").exists()
    one.run("--detach").failed("error running poststart hook #0")
    one.gone()


def test_a_failing_poststop_hook_keeps_nothing(home: Bundles) -> None:
    one = home.make("true")
    one.config["hooks"] = {"poststop": [*hook("echo no >&2; exit 6"), *hook(f"touch {home.directory}/second")]}
    result = one.run()
    assert result.code == 0
    one.gone()
    if Path(OCIRUN).name != "runc":
        assert "level=warning" in result.error
        assert "error running poststop hook #0: /bin/sh: exit status 6: no" in result.error
        assert (home.directory / "second").exists()
    two = home.make()
    two.config["hooks"] = {"poststop": hook("exit 7")}
    two.up()
    two.delete().ok()
    two.gone()


@ours  # the reference kills the hook, and then waits for its children
@pytest.mark.parametrize("kind", ["createRuntime", "createContainer"])
def test_a_hook_that_takes_too_long_is_killed_with_its_children(home: Bundles, kind: str) -> None:
    one = home.make("true")
    pid = home.directory / "pid"
    one.config["hooks"] = {kind: hook(f"sleep 1000 & echo $! > {pid}; wait", timeout=1)}
    one.run().failed("hook ran past specified timeout of 1.0s", code=1)
    one.gone()
    if kind == "createRuntime":  # inside the number is another
        eventually(lambda: not Path(f"/proc/{pid.read_text().strip()}/cmdline").exists() or _is_zombie(pid))


def _is_zombie(file: Path) -> bool:
    return ") Z " in Path(f"/proc/{file.read_text().strip()}/stat").read_text()


def test_a_hook_that_is_not_there(home: Bundles) -> None:
    one = home.make("true")
    one.config["hooks"] = {"createRuntime": [{"path": "/no/such/hook"}]}
    one.run().failed("/no/such/hook")
    one.gone()
    one.config["hooks"] = {"createRuntime": [{"path": "relative"}]}
    if Path(OCIRUN).name != "runc":
        one.run().failed("hooks.createRuntime[0].path: expected an absolute path")
        one.config["hooks"] = {"createRuntime": [{"path": "/bin/true", "timeout": 0}]}
        one.run().failed("hooks.createRuntime[0].timeout")
        one.gone()


def test_what_was_created_has_its_hooks_whatever_becomes_of_the_bundle(home: Bundles) -> None:
    """Changes of config.json after create must not affect the container (runtime-spec)."""
    one = home.make()
    trace = home.directory / "trace"
    one.config["hooks"] = {"poststart": hook(f"echo start >> {trace}"), "poststop": hook(f"echo stop >> {trace}")}
    one.create().ok()
    one.config["hooks"] = {"poststart": hook(f"echo other >> {trace}")}
    one.write()
    one.start().ok()
    (one.path / "config.json").unlink()
    one.delete().ok()
    assert trace.read_text().split() == ["start", "stop"]


def test_a_hook_may_change_the_network_namespace_before_the_process_starts(home: Bundles) -> None:
    one = home.sh("cat /proc/sys/net/ipv4/ip_default_ttl")
    find = r"""pid=$(sed 's/.*"pid":\([0-9]*\).*/\1/')"""
    ttl = f"{find}; nsenter -t $pid -n sysctl -qw net.ipv4.ip_default_ttl=33"
    one.config["hooks"] = {"createRuntime": hook(ttl)}
    assert one.run().ok() == "33\n"


def test_a_hook_that_reads_nothing_and_says_much(home: Bundles) -> None:
    one = home.make("true")
    one.config["annotations"] = {f"key{number}": "x" * 1000 for number in range(200)}
    one.config["hooks"] = {"createRuntime": hook("exec 0<&-; head -c 1000000 /dev/zero | tr '\\0' x")}
    one.run().ok()
