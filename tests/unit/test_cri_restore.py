"""RestorePod on fakes: off unless told, archives that are believed nothing, and all of a pod or nothing of it."""

from __future__ import annotations

import asyncio
import json
import os
import tarfile
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from cri.api import api_pb2 as pb
from cri.config import CheckpointSection
from cri.errors import CallFailed, DeadlineExceeded
from cri.interfaces import ContainerError
from cri.verbs.restore_pod import restore_pod
from runtime.linux import failpoint as failpoints
from tests.fakes.images import make_image
from tests.fakes.node import IMAGE, GoneAt, Rig, on_rig
from tests.fakes.snapshots import Member, device, directory, fifo, file, hardlink, symlink, tarball, xattrs

LAYER = tarball([file("written", b"1")])
DESCRIPTORS = b'["/dev/null", "pipe:[1]", "pipe:[2]"]'


def _on(tmp_path: Path, body: Callable[[Rig], Coroutine[Any, Any, None]], **section: Any) -> None:
    async def enabled(rig: Rig) -> None:
        rig.config = replace(rig.config, checkpoint=CheckpointSection(enabled=True, restore=True, **section))
        rig.node.config = rig.config
        await body(rig)

    on_rig(tmp_path, enabled)


def whole(
    *names: str, image: str = "", process: object = None, about: bytes = b"", spec: bytes = b"", **changed: object
) -> list[Member]:
    """What an archive of containers of these names has at least; `changed` of what it says about their processes."""
    found = [file("pod.dump", b"{}"), directory("containers")]
    known = {"args": ["sh", "-c", "sleep 1000"], "cwd": "/", "env": ["PATH=/bin", "HOME=/evil", "HOSTNAME=evil"]}
    known |= {"capabilities": {"bounding": ["evil"]}} | changed
    said = {"rootfsImage": "evil.test/image", "rootfsImageRef": image or make_image("busybox").id}
    for name in names:
        found += [
            directory(f"containers/{name}"),
            file(f"containers/{name}/config.dump", about or json.dumps(said).encode()),
            file(f"containers/{name}/spec.dump", spec or json.dumps({"process": process or known}).encode()),
            file(f"containers/{name}/rootfs-diff.tar", LAYER),
            directory(f"containers/{name}/checkpoint"),
            file(f"containers/{name}/checkpoint/descriptors.json", DESCRIPTORS),
            file(f"containers/{name}/checkpoint/core-1.img", b"memory"),
        ]
    return found


def _request(rig: Rig, archive: Path, *names: str, **more: Any) -> pb.RestorePodRequest:
    configs = [rig.container_config(name) for name in names]
    fields: dict[str, Any] = {"config": rig.pod_config("back"), "checkpoint_path": str(archive)}
    return pb.RestorePodRequest(**(fields | {"container_configs": configs} | more))


def _archive(rig: Rig, members: list[Member] | bytes) -> Path:
    path = rig.directory / "archive.tar"
    path.write_bytes(members if isinstance(members, bytes) else tarball(members))
    return path


def _nothing_left(rig: Rig) -> None:
    assert rig.leftovers() == []
    assert not list((rig.config.root / "checkpoints").glob("*"))


async def _refused(rig: Rig, request: pb.RestorePodRequest, words: str) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await rig.call("RestorePod", request)
    assert words in str(caught.value)
    _nothing_left(rig)
    return caught.value


def test_s71_restores_are_off_unless_the_configuration_says_otherwise(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        request = _request(rig, _archive(rig, whole("one")), "one")
        error = await _refused(rig, request, "RestorePod: restoring is off; checkpoint.restore")
        assert error.code is StatusCode.UNIMPLEMENTED

        rig.node.config = replace(rig.config, checkpoint=CheckpointSection(enabled=True))
        await _refused(rig, request, "RestorePod: restoring is off")  # who writes archives need not read any

    on_rig(tmp_path, body)


def test_what_was_checkpointed_comes_back_in_a_pod_of_the_request(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        old = [await rig.run(pod, "one"), await rig.run(pod, "two")]
        archive = tmp_path / "place"
        archive.mkdir()
        request = pb.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(archive), container_ids=old)
        await rig.call("CheckpointPod", request)
        answer = await rig.call("RestorePod", _request(rig, archive, "two", "one"))
        status = await rig.pod_status(answer.pod_sandbox_id)
        assert (status.state, status.metadata.name) == (pb.SANDBOX_READY, "back")
        assert [one.name for one in answer.restored_containers] == ["two", "one"]
        for one, before in zip(answer.restored_containers, reversed(old), strict=True):
            container = await rig.status(one.container_id)
            assert (container.state, container.metadata.name) == (pb.CONTAINER_CREATED, one.name)
            assert container.log_path == str(rig.logs / "back" / f"{one.name}.log")
            assert rig.shims.restored[one.container_id]["pages-1.img"] == f"memory of {before}".encode()
        await rig.restart()
        assert (await rig.pod_status(answer.pod_sandbox_id)).state == pb.SANDBOX_READY
        for one in answer.restored_containers:
            assert (await rig.status(one.container_id)).state == pb.CONTAINER_CREATED
            await rig.call("StartContainer", pb.StartContainerRequest(container_id=one.container_id))
            assert (await rig.status(one.container_id)).state == pb.CONTAINER_RUNNING
        for id_ in (pod, answer.pod_sandbox_id):
            await rig.remove_pod(id_)
        _nothing_left(rig)

    _on(tmp_path, body)


def test_s71_nothing_of_what_the_archive_says_about_a_container_is_kept(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        answer = await rig.call("RestorePod", _request(rig, _archive(rig, whole("one")), "one"))
        (one,) = answer.restored_containers
        assert set(rig.shims.restored[one.container_id]) == {"descriptors.json", "core-1.img"}
        status = await rig.status(one.container_id)
        assert (status.image.image, status.image_id) == (IMAGE, rig.image.id)
        config = (rig.config.state / "bundles" / one.container_id / "config.json").read_text()
        assert "evil" not in config and "sleep 1000" in config
        assert not list((rig.config.root / "checkpoints").glob("*"))

    _on(tmp_path, body)


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        ({"image": "sha256:other"}, "container_configs[1].image: the archive of container 'two' is of another image"),
        ({"about": b"{}"}, "container_configs[1].image"),
        ({"args": ["sh", "-c", "sleep 1001"]}, "container_configs[1]: command and args: the archive of container"),
        ({"args": "sh"}, "container_configs[1]: command and args"),
        ({"cwd": "/srv"}, "container_configs[1].working_dir: the archive of container 'two'"),
        ({"env": ["PATH=/bin", "KEY=secret", "WORD=said"]}, "container_configs[1].envs: the archive of container"),
        ({"env": ["PATH=/secret", "WORD=said"]}, "has another 'PATH'"),
        ({"env": ["PATH=/bin"]}, "another 'WORD', or none, or is alone in having it"),
        ({"env": {"secret": 1}}, "container_configs[1].envs"),
        ({"process": ["secret"]}, "checkpoint_path: container 'two': its spec.dump describes no process"),
        ({"spec": b"[" * 100_000}, "checkpoint_path: container 'two': its spec.dump is no JSON object"),
        ({"about": b"\xff"}, "checkpoint_path: container 'two': its config.dump is no JSON object"),
    ],
)  # fmt: skip
def test_an_archive_of_something_else_than_the_request_expects_is_refused_by_the_field(
    tmp_path: Path, archive: dict[str, Any], words: str
) -> None:
    async def body(rig: Rig) -> None:
        configs = [rig.container_config("one"), rig.container_config("two")]
        configs[1].envs.add(key="WORD", value=b"said")
        fields: dict[str, Any] = {"env": ["PATH=/bin", "WORD=said", "HOME=/other", "TERM=other"]}
        members = [*whole("one"), *whole("two", **(fields | archive))[2:]]
        request = _request(rig, _archive(rig, members), container_configs=configs)
        error = await _refused(rig, request, words)
        assert error.code is StatusCode.INVALID_ARGUMENT and "secret" not in str(error)
        (rig.directory / "archive.tar").unlink()
        request = _request(rig, _archive(rig, [*whole("one"), *whole("two", **fields)[2:]]), container_configs=configs)
        assert len((await rig.call("RestorePod", request)).restored_containers) == 2

    _on(tmp_path, body)


def test_a_variable_that_is_given_counts_where_the_request_names_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        config = rig.container_config("one")
        config.envs.add(key="HOME", value=b"/asked")
        request = _request(rig, _archive(rig, whole("one")), container_configs=[config])
        await _refused(rig, request, "container_configs[0].envs: the archive of container 'one' has another 'HOME'")

    _on(tmp_path, body)


ONE = "containers/one"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        # CVE-2026-53489 and its kin: what the archive brings is a way to a file of the host's.
        (symlink(f"{ONE}/checkpoint/pages-1.img", "/etc/shadow"), "is no plain file"),
        (symlink(f"{ONE}/container.log", "/etc/cron.d/x"), "is no plain file"),
        (symlink("containers/one/checkpoint", "/etc"), "is there twice"),
        (hardlink(f"{ONE}/checkpoint/pages-1.img", f"{ONE}/rootfs-diff.tar"), "is no plain file"),
        (device(f"{ONE}/checkpoint/pages-1.img", 8, 0, tarfile.BLKTYPE), "is no plain file"),
        (device(f"{ONE}/checkpoint/pages-1.img", 1, 1), "is no plain file"),
        (fifo(f"{ONE}/checkpoint/pages-1.img"), "is no plain file"),
        (file("/etc/cron.d/x", b"x"), "is no name inside of an archive"),
        (file("../../etc/cron.d/x", b"x"), "is no name inside of an archive"),
        (file(f"{ONE}/checkpoint/../../../x", b"x"), "is no name inside of an archive"),
        (file(f"./{ONE}/checkpoint/x.img", b"x"), "is no name inside of an archive"),
        (directory(f"{ONE}/checkpoint/deeper"), "is no directory of a checkpoint"),
        (file(f"{ONE}/checkpoint/deeper/x.img", b"x"), "is no file of a checkpoint"),
        (file(f"{ONE}/checkpoint/.hidden", b"x"), "is no file of a checkpoint"),
        (file(f"{ONE}/checkpoint/\udcff.img", b"x"), "has a name that is no text"),
        (file(f"{ONE}/checkpoint/{'long' * 40}.img", b"x"), "is no file of a checkpoint"),
        # Another container's state, another name's (tag poisoning): the caller says who there is.
        (directory("containers/other"), "is of a container that container_configs does not have"),
        (file("containers/other/rootfs-diff.tar", LAYER), "is of a container that container_configs does not have"),
        # What peers took from there: CDI devices, bind mounts, the pod's own files.
        (file(f"{ONE}/bind.mounts", b"[]"), "is no file of a checkpoint"),
        (file(f"{ONE}/cdi.json", b"{}"), "is no file of a checkpoint"),
        (file("config.dump", b"{}"), "is no file of a checkpoint"),
        (file(f"{ONE}/checkpoint/core-1.img", b"other"), "is there twice"),
        (file(f"{ONE}/dump.log", bytes((1 << 20) + 1)), "is larger than"),
        (file(f"{ONE}/checkpoint/x.img", b"", pax_headers=xattrs(security__capability=b"x")), "more than 0 xattrs"),
    ],
)
def test_s71_whatever_is_no_part_of_a_checkpoint_is_refused_by_its_name(
    tmp_path: Path, extra: Member, words: str
) -> None:
    async def body(rig: Rig) -> None:
        await _refused(rig, _request(rig, _archive(rig, [*whole("one"), extra]), "one"), words)
        assert "start" not in " ".join(rig.shims.log), "a pod was begun for it"

    _on(tmp_path, body)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "container 'one' is not in it"),
        (b"\x1f\x8b" + bytes(1000), "checkpoint_path"),
        (os.urandom(4096), "checkpoint_path"),
        (tarball(whole("one"))[:3000], "tar ends in the middle"),
        (tarball(whole("other")), "container that container_configs does not have"),
        (tarball([one for one in whole("one") if "descriptors" not in one[0].name]), "it has no containers/one/check"),
    ],
)
def test_s71_what_is_no_archive_of_these_containers_is_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    async def body(rig: Rig) -> None:
        await _refused(rig, _request(rig, _archive(rig, raw), "one"), words)

    _on(tmp_path, body)


def test_s71_an_archive_has_its_bound(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        big = file(f"{ONE}/checkpoint/pages-1.img", bytes(60_000))
        error = await _refused(rig, _request(rig, _archive(rig, [*whole("one"), big]), "one"), "archive_bytes")
        assert error.code is StatusCode.RESOURCE_EXHAUSTED

    _on(tmp_path, body, archive_bytes=60_000)


@pytest.mark.parametrize("kind", ["none", "link", "directory", "link inside", "fifo", "relative", "dots"])
def test_s71_the_archive_is_a_plain_file_at_its_own_path(tmp_path: Path, kind: str) -> None:
    async def body(rig: Rig) -> None:
        archive = _archive(rig, whole("one"))
        path = tmp_path / "given"
        if kind == "link":
            path.symlink_to(archive)
        elif kind == "directory":
            path.mkdir()
        elif kind == "link inside":
            path.mkdir()
            (path / "pod.tar").symlink_to(archive)
        elif kind == "fifo":
            os.mkfifo(path)
        text = {"relative": "given", "dots": f"{tmp_path}/../{archive.name}"}.get(kind, str(path))
        await _refused(rig, _request(rig, archive, "one", checkpoint_path=text), "checkpoint_path: ")

    _on(tmp_path, body)


def test_what_is_asked_wrongly_is_named_before_the_archive_is_looked_at(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        nowhere = tmp_path / "nosuch"
        userns = rig.pod_config("back")
        options = userns.linux.security_context.namespace_options.userns_options
        options.mode = pb.POD
        for ids in (options.uids, options.gids):
            ids.add(host_id=100_000, container_id=0, length=65536)
        image = rig.container_config("one")
        image.image.image = "registry.test/nosuch:1"
        init = rig.container_config("one", annotations={"ocid.init": "true"})
        no_init = "container_configs[1].annotations[ocid.init]: criu restores no PID 1 whose program is in no file"
        asked: list[tuple[dict[str, Any], str]] = [
            ({"container_configs": [rig.container_config("two"), init]}, no_init),
            ({"options": {"tcp-close": "1"}}, "options: 'tcp-close' is not known"),
            ({"container_configs": []}, "container_configs: 0, not from 1 to 256"),
            ({"container_configs": [rig.container_config("one")] * 2}, "container_configs[1]: 'one' is there twice"),
            ({"container_configs": [rig.container_config("..")]}, "metadata.name: '..' is no name"),
            ({"container_configs": [image]}, "image 'registry.test/nosuch:1' is not here"),
            ({"config": userns}, "criu restores no pod with a user namespace"),
            ({"runtime_handler": "nosuch"}, "runtime_handler: no handler 'nosuch'"),
            ({}, "checkpoint_path: "),
        ]
        for fields, words in asked:
            await _refused(rig, _request(rig, nowhere, "one", **fields), words)

    _on(tmp_path, body)


def test_s71_a_handler_that_compares_nothing_restores_nothing(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        runtime = replace(rig.config.runtime, handlers={**rig.config.runtime.handlers, "runc": "/usr/sbin/runc"})
        rig.node.config = rig.config = replace(rig.config, runtime=runtime)
        request = _request(rig, _archive(rig, whole("one")), "one", runtime_handler="runc")
        await _refused(rig, request, "runtime_handler: 'runc' compares nothing")

    _on(tmp_path, body)


@pytest.mark.parametrize("step", ["start", "restore", "create"])
def test_whatever_fails_nothing_is_left_and_the_same_call_works_then(tmp_path: Path, step: str) -> None:
    async def body(rig: Rig) -> None:
        request = _request(rig, _archive(rig, whole("one", "two")), "one", "two")
        rig.shims.failures[step] = ContainerError(f"{step}: told to fail", code="failed_precondition")
        await _refused(rig, request, "told to fail")
        assert len((await rig.call("RestorePod", request)).restored_containers) == 2

    _on(tmp_path, body)


POINTS = [
    *(f"run_pod.{step}" for step in ("recorded", "netns", "connected", "made")),
    *(f"create_container.{step}" for step in ("prepared", "bundled")),
    *(f"restore_pod.{step}" for step in ("read", "recorded", "unpacked", "container", "restored")),
]


@pytest.mark.parametrize("point", POINTS)
def test_o8_restore_pod_broken_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    async def body(rig: Rig) -> None:
        request = _request(rig, _archive(rig, whole("one", "two")), "one", "two")
        monkeypatch.setitem(failpoints._ARMED, point, "error")
        await _refused(rig, request, point)
        monkeypatch.delitem(failpoints._ARMED, point)
        await rig.remove_pod((await rig.call("RestorePod", request)).pod_sandbox_id)
        _nothing_left(rig)

    _on(tmp_path, body)


def test_whenever_its_caller_goes_nothing_is_left(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        request = _request(rig, _archive(rig, whole("one", "two")), "one", "two")
        for looks in (1, 2, 3):  # before criu is asked for each of them, and before they become visible
            with pytest.raises(DeadlineExceeded, match="the caller's deadline has passed"):
                await restore_pod(rig.node, request, GoneAt(looks))
            _nothing_left(rig)
        assert len((await restore_pod(rig.node, request, GoneAt(4))).restored_containers) == 2

    _on(tmp_path, body)


def test_the_second_of_two_containers_takes_the_first_with_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        members = [one for one in whole("one", "two") if one[0].name != "containers/two/rootfs-diff.tar"]
        members.append(file("containers/two/rootfs-diff.tar", b"this is no tar" * 50))
        await _refused(rig, _request(rig, _archive(rig, members), "one", "two"), "is no tar")
        assert [line for line in rig.shims.log if line.startswith("restore")], "the first one was there already"

    _on(tmp_path, body)


def test_a_daemon_killed_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        # As killed after the last container: all of it is there, and nothing of it visible.
        answer = await rig.call("RestorePod", _request(rig, _archive(rig, whole("one", "two")), "one", "two"))
        await rig.node.store.change_pod(answer.pod_sandbox_id, made_ns=0)
        for one in answer.restored_containers:
            await rig.node.store.change_container(one.container_id, made_ns=0)
        (rig.config.root / "checkpoints/abc/one").mkdir(parents=True)
        await rig.restart()
        _nothing_left(rig)

    _on(tmp_path, body)


def test_a_name_that_is_taken_is_not_restored_over(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        request = _request(rig, _archive(rig, whole("one")), "one")
        taken = await rig.run_pod("back")
        with pytest.raises(CallFailed, match=f"the name is taken by pod sandbox {taken}"):
            await rig.call("RestorePod", request)
        await rig.remove_pod(taken)
        answers = await asyncio.gather(*(rig.call("RestorePod", request) for _ in range(2)), return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, CallFailed)]
        assert len(failures) == 1 and failures[0].code is StatusCode.ALREADY_EXISTS
        open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
        assert str(rig.directory / "archive.tar") not in open_files

    _on(tmp_path, body)


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_an_exit_faster_than_the_start_is_known(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        config = rig.container_config("one", "exit 3")
        archive = _archive(rig, whole("one", args=["sh", "-c", "exit 3"]))
        request = _request(rig, archive, container_configs=[config])
        one = (await rig.call("RestorePod", request)).restored_containers[0].container_id
        await rig.call("StartContainer", pb.StartContainerRequest(container_id=one))
        status = await rig.ended(one)
        assert (status.exit_code, status.started_at > 0) == (3, True)

    _on(tmp_path, body)


def test_events_tell_of_the_pod_before_what_is_in_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        events = rig.feed.read()
        assert await anext(events) is None
        answer = await rig.call("RestorePod", _request(rig, _archive(rig, whole("one")), "one"))
        pod, one = answer.pod_sandbox_id, answer.restored_containers[0].container_id
        told = []
        for number in range(4):
            if number == 3:
                await rig.call("StartContainer", pb.StartContainerRequest(container_id=one))
            told.append(pb.ContainerEventResponse.FromString(await anext(events) or b""))
        assert [(event.container_id, event.container_event_type) for event in told] == [
            (pod, pb.CONTAINER_CREATED_EVENT),
            (pod, pb.CONTAINER_STARTED_EVENT),
            (one, pb.CONTAINER_CREATED_EVENT),
            (one, pb.CONTAINER_STARTED_EVENT),
        ]
        await events.aclose()

    _on(tmp_path, body)
