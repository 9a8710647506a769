"""RestorePod over the CRI with a criu that only pretends (tests/fakes/criu.py): what is left when criu fails, lies, is
missing, or when the daemon is killed in the middle. The real criu is in tests/vm.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from conformance.cri_client import container
from cri.api import api_pb2 as pb
from runtime import criu as wire
from runtime import lifecycle
from runtime.errors import RuntimeFailure
from tests.costs import SOON_S
from tests.e2e import Node, messages, named_log, node, stocked
from tests.fakes.snapshots import Member, directory, file, tarball
from tests.support import eventually, needs

CLONE = Path(__file__).parents[2]
ON = ("sh", "-c", "echo on; exec sleep 1000")


class Criu:
    """The program, and what it is to do."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.directory = place
        self.program = place / "criu"
        self.program.write_text(f'#!/bin/sh\ncd {CLONE} && exec {sys.executable} -m tests.fakes.criu {place} "$@"\n')
        self.program.chmod(0o755)

    def plan(self, what: str) -> None:
        (self.directory / "plan").write_text(what)


@contextlib.contextmanager
def _enabled(factory: pytest.TempPathFactory, more: str = "") -> Iterator[tuple[Node, Criu]]:
    needs("root", "overlay", "busybox")
    criu = Criu(factory.mktemp("c") / "criu")
    section = f'[checkpoint]\nrestore = true\ncriu = "{criu.program}"\n{more}'
    with stocked() as registry, node(factory.mktemp("n"), limits=section) as made:
        made.image = f"{registry.name}/busybox:1"
        made.client.pull(made.image)
        first(made)
        yield made, criu


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Criu]]:
    with _enabled(tmp_path_factory) as opened:
        yield opened


def first(made: Node) -> None:
    """What the first pod, the first filter and the first call of all leave to those that come after them."""
    config = made.pod_config(network=True)
    pod = made.client.run_pod(config)
    one = container("first", made.image, ["true"])
    one.linux.security_context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
    made.client.start(made.client.create(pod, one, config))
    made.drop(pod)
    (made.root / "checkpoints").mkdir(mode=0o700)


def _archive(node: Node, place: Path, *more: Member, command: Sequence[str] = ("sleep", "1000")) -> Path:
    """Of a container of the node's image that ran `command`."""
    request = pb.ImageStatusRequest(image=pb.ImageSpec(image=node.image), verbose=True)
    answer = node.client.images.ImageStatus(request)
    config = json.loads(answer.info["info"])["imageSpec"]["config"]
    process = {"args": list(command), "cwd": config["WorkingDir"] or "/", "env": config["Env"]}
    members = [
        directory("containers/main"),
        file("containers/main/config.dump", json.dumps({"rootfsImageRef": answer.image.id}).encode()),
        file("containers/main/spec.dump", json.dumps({"process": process}).encode()),
        file("containers/main/rootfs-diff.tar", tarball([file("written", b"1")])),
        directory("containers/main/checkpoint"),
        file("containers/main/checkpoint/descriptors.json", b'["/dev/null", "pipe:[1]", "pipe:[2]"]'),
        *more,
    ]
    path = place / "pod.tar"
    path.write_bytes(tarball(members))
    return path


def _restore(node: Node, archive: Path, command: Sequence[str] = ("sleep", "1000"), **security: Any) -> Any:
    one = container("main", node.image, command)
    one.linux.security_context.MergeFrom(pb.LinuxContainerSecurityContext(**security))
    request = pb.RestorePodRequest(
        config=node.pod_config(network=True), checkpoint_path=str(archive), container_configs=[one]
    )
    return node.client.runtime.RestorePod(request, timeout=60)


def _refused(node: Node, archive: Path, words: str, **security: Any) -> Any:
    before = node.held()
    with pytest.raises(grpc.RpcError) as caught:
        _restore(node, archive, **security)
    assert words in str(caught.value.details())
    node.settles(before)
    return caught.value


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("fail", "criu failed: type RESTORE"),
        ("die", "it ended without an answer"),
        ("outside", "is in the host's mount namespace"),
    ],
)
def test_s71_whatever_criu_does_nothing_is_left(
    bench: tuple[Node, Criu], tmp_path: Path, plan: str, words: str
) -> None:
    made, criu = bench
    criu.plan(plan)
    said = _refused(made, _archive(made, tmp_path), words).details()
    assert ("log file" in said) == (plan == "fail")
    if plan == "fail":
        assert "first: cause" in said and "first: cause" in named_log(said).read_text()
    if plan == "outside":
        assert not Path("/proc", (criu.directory / "pid").read_text()).exists()
        assert not (criu.directory / "let-go").exists()


def test_s71_a_criu_that_does_not_end_in_its_time_is_ended_with_all_that_it_restored(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    with _enabled(tmp_path_factory, "timeout_s = 2\n") as (made, criu):
        criu.plan("deaf")
        error = _refused(made, _archive(made, tmp_path), "criu did not end within 2 s, and was killed")
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "checkpoint.timeout_s in the configuration is that limit" in error.details()
        assert "this may take a while" in named_log(error.details()).read_text()
        pids = (criu.directory / "pids").read_text().split()
        assert not [pid for pid in pids if Path("/proc", pid).exists()]


def test_s71_a_filter_of_the_archives_own_is_refused_before_criu_is_asked(
    bench: tuple[Node, Criu], tmp_path: Path
) -> None:
    made, criu = bench
    criu.plan("ok")
    (criu.directory / "options").unlink(missing_ok=True)
    allow = wire.message((1, [wire.message((1, b"\x06\0\0\0\0\0\xff\x7f"))]))
    image = b"IMG1kind" + struct.pack("<I", len(allow)) + allow
    archive = _archive(made, tmp_path, file("containers/main/checkpoint/seccomp.img", image))
    default = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    _refused(made, archive, "a seccomp filter is not the one that config.json describes", seccomp=default)
    assert not (criu.directory / "options").exists()


def test_without_criu_it_says_what_to_install(bench: tuple[Node, Criu], tmp_path: Path) -> None:
    made, criu = bench
    hidden = criu.program.rename(criu.program.with_name("elsewhere"))
    try:
        error = _refused(made, _archive(made, tmp_path), "executable file not found")
    finally:
        hidden.rename(criu.program)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
def restored(bench: tuple[Node, Criu], tmp_path: Path) -> Iterator[Restored]:
    made, criu = bench
    criu.plan("restore")
    one = Restored(made, _restore(made, _archive(made, tmp_path, command=ON), ON))
    yield one
    made.drop(one.pod)


class Restored:
    """A pod of one container that was restored."""

    def __init__(self, made: Node, answer: Any) -> None:
        self.node = made
        self.client = made.client
        self.pod = answer.pod_sandbox_id
        self.id = answer.restored_containers[0].container_id
        self.log = Path(self.client.status(self.id).log_path)

    def stands(self) -> None:
        """It is created, and has not run."""
        told = self.client.status(self.id)
        assert (told.state, told.started_at) == (pb.CONTAINER_CREATED, 0)
        assert [one.state for one in self.client.list_containers() if one.id == self.id] == [pb.CONTAINER_CREATED]
        assert self.status() == "created"
        assert messages(self.log) == []

    def status(self) -> str:
        """What the runtime says."""
        return str(lifecycle.describe(str(self.node.state / "runtime"), self.id)["status"])

    def goes_on(self) -> None:
        self.client.start(self.id)
        told = self.client.status(self.id)
        assert (told.state, told.started_at > told.created_at) == (pb.CONTAINER_RUNNING, True)
        assert self.status() == "running"
        eventually(lambda: messages(self.log) == ["on"], what="it to go on")

    def refuses(self, call: Callable[[], object], words: str) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert words in str(caught.value.details())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_what_is_restored_stands_still_until_it_is_started(restored: Restored) -> None:
    restored.stands()
    restored.refuses(lambda: restored.client.exec_sync(restored.id, ["true"]), "was not started")
    restored.client.stop(restored.id, 0)
    restored.stands()
    restored.goes_on()
    restored.refuses(lambda: restored.client.start(restored.id), "is running already")
    assert restored.client.exec_sync(restored.id, ["true"])[0] == 0
    restored.client.stop(restored.id, 0)
    assert restored.client.status(restored.id).exit_code == 137


def test_it_stands_still_while_the_daemon_is_killed_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    with _enabled(tmp_path_factory) as (made, criu):
        criu.plan("restore")
        restored = Restored(made, _restore(made, _archive(made, tmp_path, command=ON), ON))
        made.end(signal.SIGKILL)
        assert restored.status() == "created"
        made.start()
        restored.client = made.client
        restored.stands()
        restored.goes_on()
        made.drop(restored.pod)


def test_runtimes_own_commands_neither_thaw_nor_freeze_it(restored: Restored) -> None:
    root = str(restored.node.state / "runtime")
    lifecycle.pause(root, restored.id)  # as of any that is created
    with pytest.raises(RuntimeFailure, match="container not paused"):
        lifecycle.resume(root, restored.id)
    restored.stands()
    restored.goes_on()


@pytest.mark.parametrize("call", ["remove", "remove_pod", "kill", "shim"])
def test_it_goes_without_having_run(bench: tuple[Node, Criu], tmp_path: Path, call: str) -> None:
    made, criu = bench
    criu.plan("restore")
    before = made.held()
    command = ["sh", "-c", "while :; do echo on; done"]
    one = Restored(made, _restore(made, _archive(made, tmp_path, command=command), command))
    if call == "remove":
        made.client.remove(one.id)
    elif call == "kill":
        lifecycle.kill(str(made.state / "runtime"), one.id, signal.SIGKILL)
        eventually(lambda: made.client.status(one.id).state == pb.CONTAINER_EXITED, what="its end to be told")
    elif call == "shim":
        os.kill(made.shim(one.pod), signal.SIGKILL)
    made.drop(one.pod)
    assert not one.log.exists() or messages(one.log) == []
    made.settles(before)


def test_a_daemon_killed_in_the_middle_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _enabled(tmp_path_factory) as (made, criu):
        archive = _archive(made, tmp_path_factory.mktemp("a"))
        criu.plan("ok")
        made.end()  # a start takes away what the first pod still had on its way out
        made.start()
        before = kept(made)
        for point in ("restore_pod.read", "restore_pod.recorded", "restore_pod.unpacked"):
            made.end()
            with monkeypatch.context() as armed:
                armed.setenv("OCID_FAILPOINTS", f"{point}=kill")
                made.start()
            with contextlib.suppress(grpc.RpcError):
                _restore(made, archive)
            assert made.process is not None and made.process.wait(SOON_S) == -9
            made.end()
            made.start()
            assert unlike(made, before) == [], f"of a kill at {point}"


def kept(made: Node) -> frozenset[str]:
    """What there is but for the daemon's own processes, which come and go here, an empty directory that does, and
    filters, which stay for the next container that has one like it."""
    mine = (f"file {made.root}/checkpoints",)
    passing = ("ocid --config", "/trash/", "/.seccomp/")
    return frozenset(thing for thing in made.held() if thing not in mine and not any(one in thing for one in passing))


def unlike(made: Node, before: frozenset[str]) -> list[str]:
    """What there is more or less than `before`, once that may have gone."""
    with contextlib.suppress(AssertionError):
        eventually(lambda: kept(made) == before, 20)
    return sorted(kept(made) ^ before)
