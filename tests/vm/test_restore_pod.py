"""CheckpointPod and RestorePod over the CRI with Debian's criu: a pod goes on as another, as the request has it.

Here and not under tests/integration: criu must know the kernel's vdso, and Debian's is older than many kernels.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from conformance.cri_client import container
from cri.api import api_pb2 as pb
from tests.e2e import Node, messages, node
from tests.fakes.registry import FakeRegistry, as_json
from tests.integration.test_e2e_restore import first, kept, unlike
from tests.support import eventually
from tests.vm.images import busybox

# Counts in a variable of the shell, which only memory that came through can go on with.
COUNT = "echo before > /written; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"
SECTION = "[checkpoint]\nenabled = true\nrestore = true\n"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with FakeRegistry() as registry, node(tmp_path_factory.mktemp("n"), limits=SECTION) as made:
        registry.add("busybox", "1", busybox())
        made.image = f"{registry.name}/busybox:1"
        made.client.pull(made.image)
        first(made)
        yield made


class Saved:
    """A pod that was checkpointed and removed; `configs` are those that it ran with."""

    def __init__(self, bench: Node, archive: Path, *configs: Any, pids: Any = pb.CONTAINER) -> None:
        self.node = bench
        self.archive = archive
        self.configs = list(configs)
        self.pids = pids
        config = self._pod_config()
        pod = bench.client.run_pod(config)
        self.last: list[int] = []
        ids = []
        for one in self.configs:
            ids.append(bench.client.create(pod, one, config))
            bench.client.start(ids[-1])
            log = Path(config.log_directory) / one.log_path
            eventually(lambda log=log: len(messages(log)) > 3, what="the container to count")  # type: ignore[misc]
        request = pb.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(archive), container_ids=ids)
        bench.client.runtime.CheckpointPod(request, timeout=300)
        for one in self.configs:
            self.last.append(int(messages(Path(config.log_directory) / one.log_path)[-1]))
        bench.drop(pod)

    def _pod_config(self) -> Any:
        config = self.node.pod_config(network=True)
        for security in (config.linux.security_context, *(one.linux.security_context for one in self.configs)):
            security.namespace_options.pid = self.pids
        return config

    def restore(self, *configs: Any, **fields: Any) -> tuple[Any, Any]:
        """The pod's config and the answer."""
        config = self._pod_config()
        request = pb.RestorePodRequest(
            config=config, checkpoint_path=str(self.archive), container_configs=configs or self.configs, **fields
        )
        return config, self.node.client.runtime.RestorePod(request, timeout=300)


def _numbers(config: Any, one: Any) -> list[int]:
    return [int(line) for line in messages(Path(config.log_directory) / one.log_path)]


def _goes_on(saved: Saved, *changed: Any) -> tuple[Any, Any]:
    """Restored, and started; the pod's config and the answer."""
    config, answer = saved.restore(*changed)
    for restored in answer.restored_containers:
        saved.node.client.start(restored.container_id)
    _count_on(saved, config)
    return config, answer


def _count_on(saved: Saved, config: Any) -> None:
    for one, last in zip(saved.configs, saved.last, strict=True):
        eventually(lambda one=one: len(_numbers(config, one)) > 3, what="the container to count on")  # type: ignore[misc]
        numbers = _numbers(config, one)
        # The dump stood between two lines that may both have been read before this test looked at the log.
        assert 3 < numbers[0] <= last + 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _stand(bench: Node, config: Any, answer: Any) -> list[str]:
    """The containers of an answer, each of which is created, and has not run a moment since it was dumped."""
    ids = [restored.container_id for restored in answer.restored_containers]
    for id_ in ids:
        told = bench.client.status(id_)
        assert (told.state, told.started_at) == (pb.CONTAINER_CREATED, 0)
        (events,) = [path / "cgroup.events" for path in Path("/sys/fs/cgroup").rglob(id_)]
        assert events.read_text().split() == ["populated", "1", "frozen", "1"]
    written = [path for path in Path(config.log_directory).rglob("*") if path.is_file() and path.read_bytes()]
    assert written == []
    return ids


def test_a_pod_goes_on_as_another_one(bench: Node, tmp_path: Path) -> None:
    before = kept(bench)
    one, two = (container(name, bench.image, ["sh", "-c", COUNT]) for name in ("one", "two"))
    two.linux.security_context.run_as_user.value = 1000
    two.linux.security_context.no_new_privs = True
    two.linux.security_context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
    saved = Saved(bench, tmp_path / "pod.tar", one, two)
    _, answer = _goes_on(saved)
    ids = {restored.name: restored.container_id for restored in answer.restored_containers}
    assert list(ids) == ["one", "two"]
    assert bench.client.exec_sync(ids["one"], ["cat", "/written"]) == (0, b"before\n", b"")
    status = bench.client.exec_sync(ids["two"], ["cat", "/proc/1/status"])[1]
    assert b"Uid:\t1000\t1000\t1000" in status and b"Seccomp:\t2\n" in status
    for id_ in ids.values():
        told = bench.client.status(id_)
        assert (told.state, told.started_at > 0) == (pb.CONTAINER_RUNNING, True)
    bench.end()
    bench.start()
    assert bench.client.exec_sync(ids["one"], ["true"])[0] == 0, "after a restart of the daemon"
    bench.client.stop(ids["one"], 0)
    assert bench.client.status(ids["one"]).exit_code == 137
    bench.drop(answer.pod_sandbox_id)
    assert unlike(bench, before) == []


def test_mounts_come_from_the_request_and_are_where_the_request_has_them(bench: Node, tmp_path: Path) -> None:
    one = container("one", bench.image, ["sh", "-c", COUNT.replace("/written", "/tmp/written")])
    one.linux.security_context.readonly_rootfs = True
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    one.mounts.add(container_path="/data", host_path=str(tmp_path / "old"), readonly=True)
    one.mounts.add(container_path="/tmp", host_path=str(tmp_path / "old"))
    saved = Saved(bench, tmp_path / "pod.tar", one)
    changed = pb.ContainerConfig.FromString(one.SerializeToString())
    changed.mounts[0].host_path = str(tmp_path / "new")
    _, answer = _goes_on(saved, changed)
    id_ = answer.restored_containers[0].container_id
    assert bench.client.exec_sync(id_, ["cat", "/data/file"])[1] == b"new"
    assert bench.client.exec_sync(id_, ["sh", "-c", "echo x > /data/file"])[0] != 0
    assert bench.client.exec_sync(id_, ["sh", "-c", "echo x > /x"])[0] != 0
    assert bench.client.exec_sync(id_, ["cat", "/proc/timer_list"])[1] == b""
    bench.drop(answer.pod_sandbox_id)


def test_containers_that_share_their_pids_with_volumes_between_them(bench: Node, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    one, two = (container(name, bench.image, ["sh", "-c", f"{COUNT} # {name}"]) for name in ("one", "two"))
    for config in (one, two):
        config.mounts.add(container_path="/shared", host_path=str(tmp_path / "shared"))
    # What is open there is open again.
    one.command[-1] = f"exec 9>>/shared/lines; {COUNT.replace('echo $i', 'echo $i; echo $i >&9')} # one"
    saved = Saved(bench, tmp_path / "pod.tar", one, two, pids=pb.POD)
    config, answer = _goes_on(saved)
    ids = {restored.name: restored.container_id for restored in answer.restored_containers}
    assert len({os.readlink(f"/proc/{bench.client.info(id_)['pid']}/ns/pid") for id_ in ids.values()}) == 1
    listed = bench.client.exec_sync(ids["two"], ["sh", "-c", "cat /proc/[0-9]*/cmdline"])[1]
    assert b"# one" in listed and b"# two" in listed
    # What was dumped has run on for a while, and written on.
    lines = [int(line) for line in (tmp_path / "shared/lines").read_text().split()]
    (again,) = [at for at in range(1, len(lines)) if lines[at] != lines[at - 1] + 1]
    assert lines[:again] == list(range(1, again + 1)) and lines[again] == _numbers(config, one)[0]
    bench.client.stop(ids["one"], 0)
    assert bench.client.status(ids["two"]).state == pb.CONTAINER_RUNNING
    bench.drop(answer.pod_sandbox_id)


def test_one_with_an_init_is_dumped_and_runs_on(bench: Node, tmp_path: Path) -> None:
    """`ocid run --init`: its program is in no file, so that criu finds none to execute; such a restore is refused."""
    one = container("one", bench.image, ["sh", "-c", COUNT])
    one.annotations["ocid.init"] = "true"
    saved = Saved(bench, tmp_path / "pod.tar", one)
    with pytest.raises(
        grpc.RpcError, match=r"container_configs\[0\]\.annotations\[ocid\.init\]: criu restores no PID 1"
    ):
        saved.restore()
    plain = pb.ContainerConfig.FromString(one.SerializeToString())
    del plain.annotations["ocid.init"]
    before = kept(bench)
    with pytest.raises(grpc.RpcError, match="criu failed: type RESTORE"):
        saved.restore(plain)
    assert unlike(bench, before) == []


def test_one_with_a_policy_is_started_again_after_it_was_restored(bench: Node, tmp_path: Path) -> None:
    """`ocid run --restart`: the next run is the command's of the request, over the writable layer."""
    one = container("one", bench.image, ["sh", "-c", COUNT.replace("> /written", ">> /written")])
    one.annotations["ocid.restart"] = "always"
    saved = Saved(bench, tmp_path / "pod.tar", one)
    config, answer = _goes_on(saved)
    id_ = answer.restored_containers[0].container_id
    os.kill(bench.client.info(id_)["pid"], signal.SIGKILL)
    # The first run has begun above three.
    eventually(lambda: {1, 3} < {*_numbers(config, one)}, what="the next run to count from the beginning")
    assert bench.client.info(id_)["restarts"] == 1
    assert bench.client.exec_sync(id_, ["cat", "/written"])[1] == b"before\nbefore\n"
    # Such a run is dumped and restored like a first one.
    target = str(tmp_path / "again.tar")
    again = pb.CheckpointPodRequest(pod_sandbox_id=answer.pod_sandbox_id, output_path=target, container_ids=[id_])
    bench.client.runtime.CheckpointPod(again, timeout=300)
    saved.archive, saved.last = tmp_path / "again.tar", [_numbers(config, one)[-1]]
    bench.drop(answer.pod_sandbox_id)
    config, answer = saved.restore()
    bench.client.start(answer.restored_containers[0].container_id)
    _count_on(saved, config)
    bench.drop(answer.pod_sandbox_id)


@pytest.fixture(scope="module")
def saved(bench: Node, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """One archive for all of these tests: of a container that is somebody, and has a filter and a mount that it may
    write to."""
    place = tmp_path_factory.mktemp("rights")
    (place / "data").mkdir()
    (place / "data").chmod(0o777)
    # Not the default profile: that depends on the capabilities, which one of the tests changes.
    profile = place / "profile"
    profile.write_bytes(as_json({"defaultAction": "SCMP_ACT_ALLOW"}))
    less = {"names": ["acct"], "action": "SCMP_ACT_ERRNO"}
    place.joinpath("profile.less").write_bytes(as_json({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [less]}))
    one = container("one", bench.image, ["sh", "-c", COUNT.replace("/written", "/data/written")])
    security = one.linux.security_context
    security.run_as_user.value, security.no_new_privs = 1000, True
    security.capabilities.drop_capabilities.extend(["SETUID", "SETGID"])
    security.seccomp.profile_type = pb.SecurityProfile.Localhost
    security.seccomp.localhost_ref = str(profile)
    one.mounts.add(container_path="/data", host_path=str(place / "data"))
    return Saved(bench, place / "pod.tar", one)


def _without_capabilities(config: Any) -> None:
    config.linux.security_context.capabilities.drop_capabilities.append("ALL")


def _as_another(config: Any) -> None:
    config.linux.security_context.run_as_user.value = 1001


def _with_other_calls(config: Any) -> None:
    config.linux.security_context.seccomp.localhost_ref += ".less"


def _without_its_mount(config: Any) -> None:
    del config.mounts[:]


def _read_only(config: Any) -> None:
    config.mounts[0].readonly = True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_capabilities, "capabilities in CapBnd that it may not have"),
        (_as_another, "has the uids 1000"),
        (_with_other_calls, "seccomp filter is not the one that config.json describes"),
        (_without_its_mount, "criu failed: type RESTORE errno 0: mnt: No mapping for"),
        (_read_only, "/data is mounted without ro"),
    ],
)
def test_s71_an_archive_has_no_right_that_the_request_does_not_give(
    bench: Node, saved: Saved, change: Callable[[Any], None], words: str
) -> None:
    before = kept(bench)
    changed = pb.ContainerConfig.FromString(saved.configs[0].SerializeToString())
    change(changed)
    with pytest.raises(grpc.RpcError) as caught:
        saved.restore(changed)
    assert words in str(caught.value.details())
    assert unlike(bench, before) == []


def test_what_is_restored_stands_still_until_it_is_started(bench: Node, tmp_path: Path) -> None:
    before = kept(bench)
    one, two = (container(name, bench.image, ["sh", "-c", COUNT]) for name in ("one", "two"))
    saved = Saved(bench, tmp_path / "pod.tar", one, two)
    config, answer = saved.restore()
    ids = _stand(bench, config, answer)
    with pytest.raises(grpc.RpcError) as caught:
        bench.client.exec_sync(ids[0], ["true"])
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    bench.client.stop(ids[0], 0)  # as of any that is created: nothing
    bench.end(signal.SIGKILL)
    bench.start()
    assert _stand(bench, config, answer) == ids, "after a daemon that was killed"
    for id_ in ids:
        bench.client.start(id_)
        assert bench.client.status(id_).state == pb.CONTAINER_RUNNING
    _count_on(saved, config)
    with pytest.raises(grpc.RpcError) as caught:
        bench.client.start(ids[0])
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    bench.drop(answer.pod_sandbox_id)
    assert unlike(bench, before) == []


def test_what_is_restored_goes_without_having_run(bench: Node, tmp_path: Path) -> None:
    before = kept(bench)
    saved = Saved(bench, tmp_path / "pod.tar", container("one", bench.image, ["sh", "-c", COUNT]))
    config, answer = saved.restore()
    (one,) = _stand(bench, config, answer)
    bench.client.remove(one)
    bench.drop(answer.pod_sandbox_id)
    config, answer = saved.restore()
    _stand(bench, config, answer)
    bench.drop(answer.pod_sandbox_id)
    assert unlike(bench, before) == []


def test_whenever_its_callers_deadline_passes_a_pod_that_is_being_dumped_goes_on(bench: Node, tmp_path: Path) -> None:
    config = bench.pod_config(network=True)
    pod = bench.client.run_pod(config)
    one = container("one", bench.image, ["sh", "-c", COUNT])
    id_ = bench.client.create(pod, one, config)
    bench.client.start(id_)
    log = Path(config.log_directory) / one.log_path
    ends = []
    for step in range(1, 13):
        target = tmp_path / f"{step}"
        target.mkdir()
        request = pb.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(target), container_ids=[id_])
        try:
            bench.client.runtime.CheckpointPod(request, timeout=0.05 * step)
            ends.append("whole")
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, error
            ends.append("late")
        eventually(lambda: not list((bench.root / "checkpoints").iterdir()), what="the work to be taken away")
        seen = len(messages(log))
        eventually(lambda seen=seen: len(messages(log)) > seen, what="the container to count on")  # type: ignore[misc]
    whole = [end for step, end in enumerate(ends, 1) if list((tmp_path / f"{step}").iterdir())]
    # The one whose archive was just whole when its caller left: gRPC has told him otherwise.
    assert "late" in ends and whole.count("late") <= 1 and whole.count("whole") == ends.count("whole")
    numbers = [int(line) for line in messages(log)]
    assert numbers == list(range(1, len(numbers) + 1))
    bench.drop(pod)


def test_a_terminal_comes_back(bench: Node, tmp_path: Path) -> None:
    one = container("one", bench.image, ["sh", "-c", COUNT])
    one.tty = True
    saved = Saved(bench, tmp_path / "pod.tar", one)
    _, answer = _goes_on(saved)
    id_ = answer.restored_containers[0].container_id
    assert bench.client.exec_sync(id_, ["sh", "-c", "readlink /proc/1/fd/1; test -c /dev/console"]) == (
        0,
        b"/dev/pts/0\n",
        b"",
    )
    bench.drop(answer.pod_sandbox_id)


@pytest.mark.parametrize("had", [True, False])
def test_a_terminal_that_only_one_of_both_has_is_refused(bench: Node, tmp_path: Path, had: bool) -> None:
    one = container("one", bench.image, ["sh", "-c", COUNT])
    one.tty = had
    saved = Saved(bench, tmp_path / "pod.tar", one)
    changed = pb.ContainerConfig.FromString(one.SerializeToString())
    changed.tty = not had
    before = kept(bench)
    with pytest.raises(grpc.RpcError) as caught:
        saved.restore(changed)
    assert "process.terminal" in str(caught.value.details())
    assert unlike(bench, before) == []
