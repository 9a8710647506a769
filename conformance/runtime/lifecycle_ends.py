"""How a container ends: kill, and what `run` makes of its command's end."""

from __future__ import annotations

import signal
import time

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.cases import Group
from conformance.harness.kernel import eventually

case = Group("lifecycle").case


@case()
def kill_by_number(box: Box) -> None:
    one = box.bundle().up()
    one.kill("9").ok()
    one.becomes("stopped")


@case()
def kill_by_name_with_and_without_prefix(box: Box) -> None:
    one = box.sh(
        "trap 'echo usr1 >> /tmp/got' USR1; trap 'echo hup >> /tmp/got' HUP; echo >> /tmp/up; "
        "while :; do sleep 0.01; done"
    )
    one.up().written("tmp/up")
    got = one.rootfs / "tmp/got"
    one.kill("SIGUSR1").ok()
    eventually(lambda: got.exists() and got.read_text() == "usr1\n", "SIGUSR1 to arrive")
    one.kill("HUP").ok()
    eventually(lambda: got.read_text() == "usr1\nhup\n", "SIGHUP to arrive")


@case()
def kill_by_lower_case_name(box: Box) -> None:
    one = box.bundle().up()
    one.kill("kill").ok()
    one.becomes("stopped")


@case()
def kill_without_a_signal_sends_sigterm(box: Box) -> None:
    one = box.sh("trap 'echo term > /tmp/got; exit' TERM; echo > /tmp/up; while :; do sleep 0.01; done")
    one.up().written("tmp/up")
    one.kill().ok()
    assert one.written("tmp/got") == "term\n"


@case()
def kill_with_a_signal_that_is_none(box: Box) -> None:
    one = box.bundle().up()
    one.kill("NONSENSE").failed("unknown signal", code=1)
    assert one.status() == "running"


@case()
def kill_of_a_stopped_container(box: Box) -> None:
    one = box.bundle("true").up().becomes("stopped")
    one.kill("TERM").failed("container not running", code=1)


@case()
def kill_of_a_created_container(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    one.kill("KILL").ok()
    one.becomes("stopped")
    one.delete().ok()


@case()
def kill_signal_zero_changes_nothing(box: Box) -> None:
    one = box.bundle().up()
    one.kill("0").ok()
    assert one.status() == "running" and kernel.alive(one.pid())


@case()
def kill_all_reaches_every_process(box: Box) -> None:
    one = box.sh("sleep 1000 & sleep 1000 & echo > /tmp/up; wait").without_namespace("pid")
    one.up().written("tmp/up")
    pids = box.call("ps", "--format", "json", one.id).json()
    assert len(pids) == 3, pids
    box.call("kill", "--all", one.id, "KILL").ok()
    eventually(lambda: not any(kernel.alive(pid) for pid in pids), "every process to end")


@case()
def a_killed_init_takes_its_pid_namespace_with_it(box: Box) -> None:
    one = box.sh("sleep 1000 & echo > /tmp/up; wait")
    one.up().written("tmp/up")
    pids = box.call("ps", "--format", "json", one.id).json()
    one.kill("KILL").ok()
    eventually(lambda: not any(kernel.alive(pid) for pid in pids), "every process to end")


@case()
def run_returns_the_exit_code(box: Box) -> None:
    assert box.sh("exit 0").run().code == 0
    assert box.sh("exit 42").run().code == 42
    assert box.sh("exit 255").run().code == 255


@case()
def run_returns_128_and_the_signal(box: Box) -> None:
    one = box.bundle()
    child = one.running()
    eventually(lambda: box.call("state", one.id).code == 0 and one.status() == "running", "it to run")
    one.kill("KILL").ok()
    assert child.wait(20) == 137


@case()
def run_removes_the_container_afterwards(box: Box) -> None:
    one = box.bundle("true")
    one.run().ok()
    box.call("state", one.id).failed("container does not exist")
    assert not (box.root / one.id).exists()


@case()
def run_keep_leaves_a_stopped_container(box: Box) -> None:
    one = box.sh("exit 3")
    assert one.run("--keep").code == 3
    assert one.status() == "stopped"
    one.delete().ok()


@case()
def run_detach_returns_at_once(box: Box) -> None:
    one = box.bundle()
    one.run("--detach").ok()
    assert one.status() == "running"
    assert kernel.alive(one.pid())


@case()
def run_passes_signals_on(box: Box) -> None:
    one = box.sh("trap 'exit 9' USR1; echo > /tmp/up; while :; do sleep 0.01; done")
    child = one.running()
    one.written("tmp/up")
    child.send_signal(signal.SIGUSR1)
    assert child.wait(20) == 9


@case()
def run_waits_for_the_command_only(box: Box) -> None:
    one = box.sh("sleep 1000 & exit 4")
    began = time.monotonic()
    assert one.run().code == 4
    assert time.monotonic() - began < 30
