"""Containers under a shim, native and by runc: life, death, and what is known of it afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.linux.process import is_running
from runtime.linux.sockets import recv_frame
from runtime.shim.client import Shims
from runtime.shim.model import ContainerError, ContainerFacts
from tests.shims import RUNC, Home, Lab, Pod, kill, lab
from tests.support import SOON_S, eventually, needs

HANDLERS = ["native", "runc"]


@pytest.fixture(params=HANDLERS)
def pods(request: pytest.FixtureRequest, home: Home, tmp_path: Path) -> Iterator[Lab]:
    needs("root", "busybox", "overlay", *(["runc"] if request.param == "runc" else []))
    with lab(tmp_path, request.param, shared=home) as opened:
        yield opened


@pytest.fixture(params=HANDLERS)
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    """With a zygote of its own, for whoever kills it."""
    needs("root", "busybox", "overlay", *(["runc"] if request.param == "runc" else []))
    with lab(tmp_path, request.param) as opened:
        yield opened


@pytest.fixture
def native(home: Home, tmp_path: Path) -> Iterator[Lab]:
    needs("root", "busybox", "overlay")
    with lab(tmp_path, shared=home) as opened:
        yield opened


class Events:
    """The frames of an event stream."""

    def __init__(self, pod: Pod) -> None:
        self._socket = socket.socket(fileno=pod.shims.events(pod.sandbox))
        self._socket.settimeout(SOON_S)

    def next(self) -> dict[str, object] | None:
        received = recv_frame(self._socket)
        return None if received is None else json.loads(received[0])

    def close(self) -> None:
        self._socket.close()


def test_a_container_lives_from_create_to_delete(pods: Lab) -> None:
    pod = pods.pod()
    before = time.time_ns()
    created = pods.shims.create(pod.sandbox, spec := pod.spec("c", ["sh", "-c", "hostname; exit 3"]))
    assert (created.id, created.exit_code, created.started_ns, created.finished_ns) == (spec.id, -1, 0, 0)
    assert before <= created.created_ns <= time.time_ns()
    assert is_running(created.pid, created.started_ticks)
    assert pod.facts(spec.id) == created
    assert pod.log("c").read_bytes() == b""  # nothing of the image ran yet
    started = pods.shims.start_container(pod.sandbox, spec.id)
    assert started.created_ns <= started.started_ns <= time.time_ns()
    ended = pod.ended(spec.id)
    assert (ended.exit_code, ended.signal, ended.oom_killed, ended.message) == (3, 0, False, "")
    assert started.started_ns <= ended.finished_ns <= time.time_ns()
    assert pod.lines("c") == [b"shimtest"]
    assert Shims.recorded(pod.bundle("c")) == ended
    pods.shims.delete(pod.sandbox, spec.id)
    assert pods.shims.reconnect(pod.sandbox) == []
    assert pods.machine.cgroups() == []
    pods.shims.delete(pod.sandbox, spec.id)  # idempotent


def test_the_runtimes_own_tool_sees_the_containers(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sleep", "100"])
    if pods.handler:
        root = pods.state / "handlers" / pods.handler.strip("/").replace("/", "-")
        listing = json.loads(subprocess.check_output([pods.handler, "--root", str(root), "list", "--format", "json"]))
        assert [(item["id"], item["status"]) for item in listing] == [(container, "running")]
    else:
        state = json.loads((pods.state / "runtime" / container / "state.json").read_text())
        assert state["id"] == container


def test_a_signalled_death_is_128_and_the_signal(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done"])
    eventually(lambda: pod.lines("c"), what="the trap")
    pods.shims.signal(pod.sandbox, container, signal.SIGTERM)
    assert (pod.ended(container).exit_code, pod.ended(container).signal) == (9, 0)
    second = pod.run("d", ["sleep", "100"])
    pods.shims.signal(pod.sandbox, second, signal.SIGKILL)
    assert (pod.ended(second).exit_code, pod.ended(second).signal) == (137, 9)
    pods.shims.signal(pod.sandbox, second, signal.SIGTERM)  # gone: no-op
    pods.shims.signal(pod.sandbox, "no-such-container", signal.SIGTERM)


def test_everyone_is_signalled(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sh", "-c", "sleep 1000 & sleep 1000 & echo ready; wait"])
    eventually(lambda: pod.lines("c"))
    pods.shims.signal(pod.sandbox, container, signal.SIGKILL, everyone=True)
    assert pod.ended(container).signal == 9


@pytest.mark.parametrize("everyone", [False, True])
def test_a_created_container_can_be_deleted_unstarted(pods: Lab, everyone: bool) -> None:
    pod = pods.pod()
    container = pod.create("c", ["true"])
    pid = pod.facts(container).pid
    if everyone:
        pods.shims.signal(pod.sandbox, container, signal.SIGKILL, everyone=True)
        assert pod.ended(container).exit_code == 137
    pods.shims.delete(pod.sandbox, container)
    assert not Path(f"/proc/{pid}").exists()


def test_a_command_that_does_not_exist_is_named_and_the_container_has_ended(pods: Lab) -> None:
    pod = pods.pod()
    with pytest.raises(ContainerError, match="no-such-command"):  # some runtimes tell at create, some at start
        pods.shims.start_container(pod.sandbox, pod.create("c", ["no-such-command"]))
    for facts in pods.shims.reconnect(pod.sandbox) or ():
        assert pod.ended(facts.id).exit_code not in (0, -1)
        pods.shims.delete(pod.sandbox, facts.id)
    assert pods.machine.cgroups() == []
    assert pod.ended(pod.run("c", ["true"])).exit_code == 0


def test_states_that_do_not_fit_are_refused(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.create("c", ["sleep", "100"])
    for wrong, code in (
        (lambda: pods.shims.create(pod.sandbox, pod.spec("c", ["true"])), "already_exists"),
        (lambda: pod.exec(container, ["true"]), "failed_precondition"),
        (lambda: pods.shims.start_container(pod.sandbox, "none"), "not_found"),
        (lambda: pods.shims.update(pod.sandbox, "none", {}), "not_found"),
        (lambda: pods.shims.reopen_log(pod.sandbox, "none"), "not_found"),
        (lambda: pods.shims.signal(pod.sandbox, container, 99), "invalid_argument"),
    ):
        with pytest.raises(ContainerError) as caught:
            wrong()
        assert caught.value.code == code
    pods.shims.start_container(pod.sandbox, container)
    with pytest.raises(ContainerError, match="started already") as caught:
        pods.shims.start_container(pod.sandbox, container)
    assert caught.value.code == "failed_precondition"
    pods.shims.signal(pod.sandbox, container, signal.SIGKILL)
    pod.ended(container)
    with pytest.raises(ContainerError, match="has ended"):
        pod.exec(container, ["true"])


@pytest.mark.parametrize("config", ['{"ociVersion": 5}', "{", '{"ociVersion": "1.0.2", "root": {"path": 7}}'])
def test_a_bad_config_is_one_sentence_and_leaves_nothing(pods: Lab, config: str) -> None:
    pod = pods.pod()
    spec = pod.spec("c", ["true"])
    good = (spec.bundle / "config.json").read_text()
    (spec.bundle / "config.json").write_text(config)
    with pytest.raises(ContainerError, match=f"create container {spec.id}: "):
        pods.shims.create(pod.sandbox, spec)
    assert pods.shims.reconnect(pod.sandbox) == []
    assert list((pod.directory / "containers").iterdir()) == []
    assert [mount for mount in pods.machine.mounts() if str(spec.bundle) in mount] == []
    (spec.bundle / "config.json").write_text(good)
    pods.shims.create(pod.sandbox, spec)


def test_a_log_that_cannot_be_opened_is_named(pods: Lab) -> None:
    pod = pods.pod()
    pod.log("c").symlink_to("/dev/null")
    with pytest.raises(ContainerError, match=r"c\.log"):
        pods.shims.create(pod.sandbox, pod.spec("c", ["true"]))
    assert pods.shims.reconnect(pod.sandbox) == []


def test_events_reach_every_subscriber_after_the_log_is_whole(pods: Lab) -> None:
    pod = pods.pod()
    streams = [Events(pod), Events(pod)]
    container = pod.run("c", ["sh", "-c", "seq 1 5000; exit 4"])
    for stream in streams:
        event = stream.next()
        assert event is not None and event["event"] == "exit"
        assert len(pod.lines("c")) == 5000
        assert ContainerFacts(**event["facts"]) == pod.facts(container)  # type: ignore[arg-type]
    pod.stop()
    assert [stream.next() for stream in streams] == [None, None]
    for stream in streams:
        stream.close()


def late_runtime(tmp_path: Path, code: int) -> str:
    """runc, but that `start` returns once the process that it has started is gone, with `code`."""
    late = tmp_path / "late"
    late.write_text(
        f'#!/bin/sh\n"{RUNC}" "$@" || exit\ncase " $* " in *" start "*) ;; *) exit ;; esac\n'
        f'for id; do :; done\nwhile "{RUNC}" --root "$2" state "$id" | grep -q running; do :; done\nexit {code}\n'
    )
    late.chmod(0o755)
    return str(late)


def test_an_exit_is_told_after_the_start_that_it_overtook(native: Lab, tmp_path: Path) -> None:
    pod = native.pod()
    pod.handler = late_runtime(tmp_path, 0)
    stream = Events(pod)
    container = pod.run("c", ["true"])
    event = stream.next()
    assert event is not None and event["event"] == "exit"
    assert event["facts"]["started_ns"] and ContainerFacts(**event["facts"]) == pod.facts(container)  # type: ignore
    stream.close()


def test_an_exit_that_overtook_a_failing_start_is_told_when_that_has_failed(native: Lab, tmp_path: Path) -> None:
    pod = native.pod()
    pod.handler = late_runtime(tmp_path, 1)
    stream = Events(pod)
    with pytest.raises(ContainerError):
        pod.run("c", ["true"])
    event = stream.next()
    assert event is not None and event["event"] == "exit" and not event["facts"]["started_ns"]  # type: ignore
    stream.close()
    pod.shims.delete(pod.sandbox, f"{pod.id}-c")


def test_o55_a_slow_subscriber_is_let_go_and_holds_nobody_up(native: Lab) -> None:
    pod = native.pod()
    slow, fast = Events(pod), Events(pod)
    for number in range(5):
        container = pod.run(f"c{number}", ["true"])
        event = fast.next()
        assert event is not None and event["facts"]["id"] == container  # type: ignore[index]
    slow.close()
    fast.close()
    assert len(native.shims.reconnect(pod.sandbox) or ()) == 5


def test_o15_an_exit_is_recorded_before_it_is_told(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sh", "-c", "exit 7"])
    eventually(lambda: Shims.recorded(pod.bundle("c")))
    kill(pod.sandbox)
    assert pods.shims.reconnect(pod.sandbox) is None
    found = pods.shims.lost(pod.sandbox)
    assert [(facts.id, facts.exit_code, facts.signal) for facts in found] == [(container, 7, 0)]
    assert pods.shims.lost(pod.sandbox) == found


def test_o13_o17_containers_outlive_the_shim_and_their_exit_is_unknown_not_invented(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sh", "-c", "while :; do echo alive; sleep 0.05; done"])
    eventually(lambda: pod.lines("c"))
    facts = pod.facts(container)
    kill(pod.sandbox)
    written = len(pod.lines("c"))
    # It writes on, nobody reads: neither SIGPIPE nor an error ends it.
    before = Path(f"/proc/{facts.pid}/io").read_text()
    eventually(lambda: Path(f"/proc/{facts.pid}/io").read_text() != before)
    assert is_running(facts.pid, facts.started_ticks)
    assert len(pod.lines("c")) == written
    assert pods.shims.reconnect(pod.sandbox) is None
    lost = pods.shims.lost(pod.sandbox)
    assert [(item.id, item.exit_code, item.pid) for item in lost] == [(container, 255, facts.pid)]
    assert "not known" in lost[0].message and lost[0].finished_ns > facts.started_ns
    assert not is_running(facts.pid, facts.started_ticks)
    assert Shims.recorded(pod.bundle("c")) == lost[0]


def test_o13_signal_delete_and_stop_work_without_the_shim(pods: Lab) -> None:
    pod = pods.pod()
    first, second = pod.run("c", ["sleep", "1000"]), pod.run("d", ["sleep", "1000"])
    pids = [(facts.pid, facts.started_ticks) for facts in map(pod.facts, (first, second))]
    kill(pod.sandbox)
    pods.shims.signal(pod.sandbox, first, signal.SIGKILL)
    eventually(lambda: not is_running(*pids[0]))
    assert is_running(*pids[1])
    pods.shims.delete(pod.sandbox, first)
    pods.shims.delete(pod.sandbox, first)
    assert len(pods.machine.cgroups()) > 0
    pod.stop()
    assert not is_running(*pids[1])
    assert pods.machine.cgroups() == []


def test_stop_takes_running_containers_with_it(pods: Lab) -> None:
    pod = pods.pod()
    pids = []
    for name in ("a", "b", "c"):
        container = pod.run(name, ["sh", "-c", "trap '' TERM HUP INT; sleep 1000 & sleep 1000"])
        pids.append((pod.facts(container).pid, pod.facts(container).started_ticks))
    pod.stop()
    assert not any(is_running(*pid) for pid in pids)


def test_o16_a_container_is_deleted_while_its_pod_ends(native: Lab) -> None:
    """A kubelet removes a pod's containers and stops the pod from two workers: neither is the other's failure."""
    pod = native.pod()
    first, *_ = [pod.run(f"c{number}", ["sleep", "1000"]) for number in range(8)]
    pid = pod.facts(first).pid
    stopping = threading.Thread(target=pod.shims.stop, args=[pod.sandbox])
    stopping.start()
    # The stop has this one's lock from here to the end of the shim, and seven others to delete.
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), what="the first to be killed")
    pod.shims.delete(pod.sandbox, first)
    stopping.join()
    assert not is_running(pod.sandbox.pid, pod.sandbox.started_ticks)
    assert native.machine.mounts() == native.machine.cgroups() == []


def test_a_restarted_daemon_knows_everything(alone: Lab) -> None:
    pod = alone.pod()
    running, ended = pod.run("c", ["sleep", "1000"]), pod.run("d", ["sh", "-c", "echo out; exit 5"])
    pod.ended(ended)
    os.kill(alone.zygote(), signal.SIGKILL)
    alone.restarted()
    known = {facts.id: facts for facts in alone.shims.reconnect(pod.sandbox) or ()}
    assert known[running].finished_ns == 0 and known[ended].exit_code == 5
    assert pod.lines("d") == [b"out"]
    assert pod.exec(running, ["echo", "hi"]).stdout == b"hi\n"


def test_o16_exits_in_the_same_moment_are_all_right(native: Lab) -> None:
    pod = native.pod()
    fifo = pod.directory / "shm" / "go"
    os.mkfifo(fifo)
    codes = {}
    for number in range(12):
        script = f"read line < /dev/shm/go; exit {number}"
        codes[pod.run(f"c{number}", ["sh", "-c", script])] = number
    keep = os.open(fifo, os.O_RDWR)
    for facts in native.shims.reconnect(pod.sandbox) or ():
        eventually(
            lambda pid=facts.pid: (
                b"fifo" in Path(f"/proc/{pid}/wchan").read_bytes()  # type: ignore[misc]
                or Path(f"/proc/{pid}/stat").read_text().split()[2] == "S"
            )
        )
    os.write(keep, b"go\n" * 12)
    for container, code in codes.items():
        assert pod.ended(container).exit_code == code
    os.close(keep)


def test_o31_orphans_are_reaped_by_the_shim(native: Lab) -> None:
    """Without a PID namespace of its own a container's orphans become the shim's children."""
    pod = native.pod(shared_pid=True)
    namespaces = [{"type": "mount"}, {"type": "pid", "path": f"{pod.directory}/ns/pid"}]
    linux = {"namespaces": namespaces}
    host = {"namespaces": [{"type": "mount"}]}
    for name, value in (("shared", linux), ("host", host)):
        script = "for i in 1 2 3 4 5 6 7 8 9; do (sleep 0.01 &) ; done; echo done; sleep 1000"
        container = pod.run(name, ["sh", "-c", script], linux=value)
        eventually(lambda name=name: pod.lines(name))  # type: ignore[misc]
        pid = pod.facts(container).pid
        allowed = {pid, pod.sandbox.pause_pid}

        def zombies(allowed: set[int] = allowed) -> list[str]:
            found = []
            for parent in (pod.sandbox.pid, pod.sandbox.pause_pid):
                for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
                    if int(child) in allowed:
                        continue
                    try:
                        found.append(Path(f"/proc/{child}/stat").read_text())
                    except (FileNotFoundError, ProcessLookupError):
                        continue  # reaped between the two looks
            return [stat for stat in found if ") Z " in stat]

        eventually(lambda check=zombies: not check(), what="zombies to be reaped")  # type: ignore[misc]
        native.shims.delete(pod.sandbox, container)


def test_o35_what_a_container_with_the_hosts_pids_leaves_is_killed(native: Lab) -> None:
    pod = native.pod()
    container = pod.run("c", ["sh", "-c", "sleep 1234 & echo $!; exit 0"], linux={"namespaces": [{"type": "mount"}]})
    assert pod.ended(container).exit_code == 0
    orphan = int(pod.lines("c")[0])
    eventually(lambda: not Path(f"/proc/{orphan}").exists(), what="the orphan to be killed")


def test_s68_an_oom_kills_the_container_not_the_shim(pods: Lab) -> None:
    pod = pods.pod()
    stream = Events(pod)
    limit = {"resources": {"memory": {"limit": 16 << 20, "swap": 16 << 20}}}
    script = "x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo survived"
    spec = pod.spec("c", ["sh", "-c", script])
    document = json.loads((spec.bundle / "config.json").read_text())
    document["linux"].update(limit)
    (spec.bundle / "config.json").write_text(json.dumps(document))
    pods.shims.create(pod.sandbox, spec)
    pods.shims.start_container(pod.sandbox, spec.id)
    facts = pod.ended(spec.id, 60)
    assert facts.oom_killed
    kinds = []
    while "exit" not in kinds:
        event = stream.next()
        assert event is not None
        kinds.append(event["event"])
    stream.close()
    assert set(kinds) <= {"oom", "exit"}
    shim = pod.sandbox.pid
    assert spec.id not in Path(f"/proc/{shim}/cgroup").read_text()
    second = pod.run("d", ["sh", "-c", "exit 1"])
    assert not pod.ended(second).oom_killed


def test_s68_shims_are_the_last_to_be_killed_where_that_is_permitted(native: Lab) -> None:
    pod = native.pod()
    score = int(Path(f"/proc/{pod.sandbox.pid}/oom_score_adj").read_text())
    capable = int(Path("/proc/self/status").read_text().split("CapEff:\t")[1].split()[0], 16) >> 24 & 1
    assert score == (-999 if capable else int(Path("/proc/self/oom_score_adj").read_text()))


def test_s75_a_container_that_kills_everything_it_can_hits_nobody_outside(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sh", "-c", "kill -9 0"])
    pod.ended(container)
    second = pod.run("d", ["sh", "-c", "kill -9 -1; echo alive"])
    pod.ended(second)
    assert is_running(pod.sandbox.pid, pod.sandbox.started_ticks)
    assert Path(f"/proc/{pods.zygote()}").exists()
    assert pod.ended(pod.run("e", ["true"])).exit_code == 0


def test_s75_a_container_is_in_a_session_of_its_own(pods: Lab) -> None:
    pod = pods.pod()
    facts = pod.facts(pod.run("c", ["sleep", "100"]))
    assert os.getsid(facts.pid) == facts.pid != os.getsid(pod.sandbox.pid)
    assert os.getpgid(facts.pid) == facts.pid


def test_limits_are_updated(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sleep", "100"])
    pods.shims.update(pod.sandbox, container, {"pids": {"limit": 77}, "memory": {"limit": 64 << 20}})
    found = [
        Path(path, "pids.max").read_text().strip() for path in pods.machine.cgroups() if Path(path, "pids.max").exists()
    ]
    assert found == ["77"]


def test_a_container_stands_still_and_goes_on_and_is_deleted_also_when_it_stands_still(pods: Lab) -> None:
    pod = pods.pod()
    one = pod.run("c", ["sh", "-c", "while :; do echo tick; usleep 10000; done"])
    pods.shims.resume(pod.sandbox, one)  # it does not stand still
    eventually(lambda: pod.lines("c"), what="ticks")
    pods.shims.pause(pod.sandbox, one)
    with pytest.raises(ContainerError, match=f"pause container {one}"):
        pods.shims.pause(pod.sandbox, one)
    known = len(pod.lines("c"))
    pods.shims.resume(pod.sandbox, one)
    eventually(lambda: len(pod.lines("c")) > known, what="ticks after it was let go")
    pods.shims.pause(pod.sandbox, one)
    pods.shims.delete(pod.sandbox, one)


def test_a_container_is_set_up_in_its_helpers_memory_and_starts_from_there(native: Lab) -> None:
    pod = native.pod()
    container = pod.create("c", ["sh", "-c", "echo here; exit 5"])
    faults = int(Path(f"/proc/{pod.facts(container).pid}/stat").read_text().rpartition(")")[2].split()[7])
    assert faults < 250  # a fork copies some 600 pages on the way
    pod.shims.start_container(pod.sandbox, container)
    assert pod.ended(container).exit_code == 5
    assert pod.lines("c") == [b"here"]


def test_a_small_limit_of_memory_is_the_containers_alone(native: Lab) -> None:
    pod = native.pod()
    with pytest.raises(ContainerError, match="memory"):  # says what killed it: the helper lives to tell
        pod.run("c", ["true"], linux={"resources": {"memory": {"limit": 4096}}})
    assert native.machine.cgroups() == []


@pytest.mark.parametrize("where", ["init.rootfs", "init.identity"])
def test_o37_an_init_that_is_killed_while_it_is_set_up_is_told_of_and_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    needs("root", "busybox", "overlay")
    monkeypatch.setenv("OCID_FAILPOINTS", f"{where}=kill")
    with lab(tmp_path) as opened:
        pod = opened.pod()
        monkeypatch.delenv("OCID_FAILPOINTS")
        spec = pod.spec("c", ["true"])
        for _ in range(2):
            with pytest.raises(ContainerError, match="its init was killed while it was set up"):
                opened.shims.create(pod.sandbox, spec)
        opened.shims.delete(pod.sandbox, spec.id)
        assert opened.machine.cgroups() == []
        assert not (opened.state / "runtime" / spec.id).exists()


def test_o24_a_create_that_dies_half_way_leaves_nothing(native: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = native.pod()
    spec = pod.spec("c", ["true"])
    document = json.loads((spec.bundle / "config.json").read_text())
    document["mounts"].append({"destination": "/x", "type": "bind", "source": "/no/such/source", "options": ["bind"]})
    (spec.bundle / "config.json").write_text(json.dumps(document))
    with pytest.raises(ContainerError, match="/no/such/source"):
        native.shims.create(pod.sandbox, spec)
    assert native.machine.cgroups() == []
    assert not (native.state / "runtime" / spec.id).exists()
    assert native.shims.reconnect(pod.sandbox) == []
