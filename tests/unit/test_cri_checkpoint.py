"""Checkpoints on fakes: off unless told, a pod held still and let go on every path, archives that replace nothing."""

from __future__ import annotations

import asyncio
import json
import tarfile
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from cri import criu_logs
from cri.api import api_pb2 as pb
from cri.checkpoint_archive import write
from cri.config import CheckpointSection
from cri.errors import AlreadyExists, CallFailed, DeadlineExceeded, LimitExceeded
from cri.interfaces import ContainerError
from cri.patience import Patience
from cri.verbs.checkpoint import checkpoint_pod
from tests.fakes.node import GoneAt, Rig, on_rig


def _on(tmp_path: Path, body: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
    async def enabled(rig: Rig) -> None:
        rig.config = replace(rig.config, checkpoint=CheckpointSection(enabled=True, criu="/opt/criu"))
        rig.node.config = rig.config
        await body(rig)

    on_rig(tmp_path, enabled)


def _pod_request(rig: Rig, pod: str, target: Path, **more: Any) -> pb.CheckpointPodRequest:
    """Of all that run in the pod, unless told."""
    ids = [container.id for container in rig.node.store.containers_of(pod) if container.running]
    return pb.CheckpointPodRequest(**{"pod_sandbox_id": pod, "output_path": str(target), "container_ids": ids} | more)


def _container_request(container: str, target: Path | str, **more: Any) -> pb.CheckpointContainerRequest:
    return pb.CheckpointContainerRequest(container_id=container, location=str(target), **more)


def _still(rig: Rig) -> None:
    """Nothing stands still, and nothing is left of an attempt."""
    assert rig.shims.frozen() == []
    assert not list(rig.config.state.glob("pods/*/paused"))
    assert not list((rig.config.root / "checkpoints").glob("*"))


def test_a_callers_deadline_is_criu_s_and_a_part_of_it_is_left_to_answer() -> None:
    assert Patience().within(600, "the limit") == (600, "the limit")
    assert Patience(1000).within(600, "the limit") == (600, "the limit")
    seconds, whose = Patience(100).within(600, "the limit")
    assert 90 < seconds <= 98 and whose == "the caller's deadline"
    for ask in (Patience(0).check, lambda: Patience(0).within(600, "the limit")):
        with pytest.raises(DeadlineExceeded, match="the caller's deadline has passed"):
            ask()


def test_a_pods_deadline_goes_into_the_time_of_criu(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        await rig.run(pod)
        await rig.call("CheckpointPod", _pod_request(rig, pod, tmp_path / "pod.tar"), left_s=50)
        with tarfile.open(tmp_path / "pod.tar") as archive:
            (log,) = [name for name in archive.getnames() if name.endswith("/dump.log")]
            said = archive.extractfile(log)
            assert said is not None and 30 < float(said.read().split()[-2]) <= 48

    _on(tmp_path, body)


def test_whenever_its_caller_goes_a_checkpoint_lets_the_pod_go_on_and_leaves_nothing(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        for name in ("one", "two"):
            await rig.run(pod, name)
        target = tmp_path / "out"
        target.mkdir()
        looks = 0
        while True:
            looks += 1
            gone = GoneAt(looks)
            try:
                await checkpoint_pod(rig.node, _pod_request(rig, pod, target), gone)
            except DeadlineExceeded:
                assert list(target.iterdir()) == []
                _still(rig)
                continue
            break
        assert looks > 10 and [path.name for path in target.iterdir()] == ["pod.tar"]
        _still(rig)

    _on(tmp_path, body)


def test_s71_off_unless_the_configuration_says_otherwise(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        one = await rig.run(pod)
        requests = {
            "CheckpointContainer": _container_request(one, tmp_path / "x"),
            "CheckpointPod": _pod_request(rig, pod, tmp_path / "x"),
            "RestorePod": pb.RestorePodRequest(checkpoint_path=str(tmp_path / "x")),
        }
        for name, request in requests.items():
            with pytest.raises(CallFailed, match=name) as caught:
                await rig.call(name, request)
            assert caught.value.code is StatusCode.UNIMPLEMENTED
        assert "checkpoint" not in " ".join(rig.shims.log) and not (tmp_path / "x").exists()

    on_rig(tmp_path, body)


def test_a_container_becomes_an_archive_and_runs_on(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        one, other = await rig.run(pod, "one"), await rig.run(pod, "other")
        target = tmp_path / "c.tar"
        await rig.call("CheckpointContainer", _container_request(one, target, timeout=7))
        assert target.stat().st_mode & 0o777 == 0o600
        with tarfile.open(target) as archive:
            names = set(archive.getnames())
            assert names == {
                "checkpoint", "checkpoint/pages-1.img", "checkpoint/descriptors.json", "config.dump", "spec.dump",
                "rootfs-diff.tar", "dump.log"
            }  # fmt: skip

            def read(name: str) -> bytes:
                file = archive.extractfile(name)
                assert file is not None
                return file.read()

            about = json.loads(read("config.dump"))
            assert (about["id"], about["name"], about["runtime"]) == (one, "one", "native")
            assert about["rootfsImageRef"] == rig.image.id and about["checkpointedTime"].endswith("Z")
            assert json.loads(read("spec.dump"))["process"]["args"] == ["sh", "-c", "sleep 1000"]
            assert read("checkpoint/pages-1.img") == f"memory of {one}".encode()
            assert read("dump.log") == b"/opt/criu, at most 7 s\n"
        assert f"checkpoint {one} frozen ['{one}']" in rig.shims.log
        assert f"pause {other}" not in rig.shims.log
        _still(rig)

    _on(tmp_path, body)


def test_all_of_a_pod_stands_still_before_the_first_is_dumped(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        ids = sorted([await rig.run(pod, "one"), await rig.run(pod, "two")])
        await rig.create(pod, "created")
        await rig.call("CheckpointPod", _pod_request(rig, pod, tmp_path / "pod.tar"))
        dumps = [line for line in rig.shims.log if line.startswith("checkpoint")]
        assert len(dumps) == 2 and all(line.endswith(f"frozen {ids}") for line in dumps)
        with tarfile.open(tmp_path / "pod.tar") as archive:
            names = archive.getnames()
            assert {"pod.dump", "containers/one/config.dump", "containers/two/checkpoint/pages-1.img"} <= set(names)
            assert not [name for name in names if name.startswith(("/", "..")) or "created" in name]
        with pytest.raises(CallFailed, match=r"container_ids\[1\]: .* is there twice"):
            await rig.call(
                "CheckpointPod", _pod_request(rig, pod, tmp_path / "one.tar", container_ids=[ids[0], ids[0]])
            )
        # As the CRI has it: an empty directory of the caller's.
        place = tmp_path / "place"
        place.mkdir()
        await rig.call("CheckpointPod", _pod_request(rig, pod, place, container_ids=[ids[0]]))
        assert [path.name for path in place.iterdir()] == ["pod.tar"]
        with pytest.raises(CallFailed, match="output_path: .* is not empty"):
            await rig.call("CheckpointPod", _pod_request(rig, pod, place))
        assert rig.shims.log.count(f"pause {ids[0]}") == 2 and rig.shims.log.count(f"pause {ids[1]}") == 1
        _still(rig)

    _on(tmp_path, body)


@pytest.mark.parametrize("step", ["pause", "checkpoint"])
def test_whatever_fails_all_of_them_go_on(tmp_path: Path, step: str) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        ids = [await rig.run(pod, "one"), await rig.run(pod, "two")]
        rig.shims.failures[step] = ContainerError(f"{step}: told to fail", code="failed_precondition")
        with pytest.raises(CallFailed, match="told to fail") as caught:
            await rig.call("CheckpointPod", _pod_request(rig, pod, tmp_path / "pod.tar"))
        assert caught.value.code is StatusCode.FAILED_PRECONDITION
        assert not (tmp_path / "pod.tar").exists()
        _still(rig)
        await rig.call("CheckpointPod", _pod_request(rig, pod, tmp_path / "pod.tar"))  # and the same call works now
        assert {line for line in rig.shims.log if line.startswith("resume")} == {f"resume {id_}" for id_ in ids}

    _on(tmp_path, body)


def test_one_that_cannot_be_thawed_keeps_no_other_and_is_tried_again_at_the_next_start(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        ids = [await rig.run(pod, "one"), await rig.run(pod, "two")]
        rig.shims.failures["resume"] = ContainerError("resume: told to fail", code="unavailable")
        with pytest.raises(CallFailed, match="told to fail"):
            await rig.call("CheckpointPod", _pod_request(rig, pod, tmp_path / "pod.tar"))
        assert rig.shims.frozen() == ids[:1]
        await rig.restart()
        _still(rig)

    _on(tmp_path, body)


def test_a_killed_daemon_leaves_nobody_frozen(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        one = await rig.run(pod, "one")
        # As killed in the middle of a dump: note, frozen container, half an archive.
        rig.node.paths.pod(pod).mkdir(parents=True, exist_ok=True)
        (rig.node.paths.pod(pod) / "paused").write_text(json.dumps([one, "f" * 64]))
        rig.shims.pause(rig.sandbox(pod), one)
        (rig.config.root / "checkpoints/abc/checkpoint").mkdir(parents=True)
        await rig.restart()
        _still(rig)

    _on(tmp_path, body)


def test_a_start_that_finds_nobody_frozen_complains_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(rig: Rig) -> None:
        await rig.run(await rig.run_pod())
        await rig.restart()

    _on(tmp_path, body)
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_a_caller_that_leaves_leaves_nobody_frozen(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        one = await rig.run(pod, "one")
        for turns in range(1, 12):
            call = asyncio.ensure_future(
                rig.call("CheckpointContainer", _container_request(one, tmp_path / f"{turns}.tar"))
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait({call})
        assert not await rig.node.tasks.drain(10)
        _still(rig)

    _on(tmp_path, body)


def test_two_checkpoints_of_a_pod_take_turns(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        await rig.run(pod, "one")
        calls = [rig.call("CheckpointPod", _pod_request(rig, pod, tmp_path / f"{number}.tar")) for number in range(4)]
        await asyncio.gather(*calls)
        _still(rig)

    _on(tmp_path, body)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"location": ""}, "location: '' is no absolute path"),
        ({"location": "x.tar"}, "location: 'x.tar' is no absolute path"),
        ({"location": "/tmp/../etc/x"}, "location: '/tmp/../etc/x' is no absolute path"),
        ({"location": "/nosuch/x.tar"}, "location: /nosuch is no directory"),
        ({"location": "/etc/passwd"}, "location: /etc/passwd is there already"),
        ({"timeout": -1}, "timeout: -1 s"),
        ({"timeout": 10**9}, "timeout: 1000000000 s"),
    ],
)
def test_what_is_asked_wrongly_is_named_before_anything_stands_still(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    async def body(rig: Rig) -> None:
        one = await rig.run(await rig.run_pod())
        request = {"container_id": one, "location": str(tmp_path / "x.tar")} | fields
        with pytest.raises(CallFailed) as caught:
            await rig.call("CheckpointContainer", pb.CheckpointContainerRequest(**request))
        assert str(caught.value).startswith(words)
        assert f"pause {one}" not in rig.shims.log

    _on(tmp_path, body)


def test_containers_of_others_options_and_pods_that_do_not_run_are_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod, other = await rig.run_pod("one"), await rig.run_pod("other")
        target = tmp_path / "x.tar"
        created = await rig.create(pod, "created")
        with pytest.raises(CallFailed, match=f"checkpoint created .*{created[:13]}.*") as caught:
            await rig.call("CheckpointPod", _pod_request(rig, pod, target, container_ids=[created]))
        assert caught.value.code is StatusCode.FAILED_PRECONDITION
        stranger = await rig.run(other)
        await rig.run(pod)
        with pytest.raises(CallFailed, match="container_ids: none is named") as caught:
            await rig.call("CheckpointPod", _pod_request(rig, pod, target, container_ids=[]))
        assert caught.value.code is StatusCode.INVALID_ARGUMENT
        with pytest.raises(CallFailed, match=r"container_ids\[0\]: container .* is of another pod"):
            await rig.call("CheckpointPod", _pod_request(rig, pod, target, container_ids=[stranger]))
        with pytest.raises(CallFailed, match="options: 'compress' is not known"):
            await rig.call("CheckpointPod", _pod_request(rig, pod, target, options={"compress": "1"}))
        await rig.stop_pod(pod)
        with pytest.raises(CallFailed, match="it is not ready"):
            await rig.call("CheckpointPod", _pod_request(rig, pod, target))
        assert not target.exists()

    _on(tmp_path, body)


def test_an_archive_has_its_bound_and_replaces_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    (source / "a/file").write_bytes(b"x" * 5000)
    (source / "a/link").symlink_to("/etc/passwd")
    (source / ("long" * 60)).write_bytes(b"y")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(LimitExceeded, match="archive_bytes"):
        write(source, out / "x.tar", 5000)
    with pytest.raises(OSError):  # a link is no file of criu's
        write(source, out / "x.tar", 1 << 20)
    (source / "a/link").unlink()
    assert list(out.iterdir()) == []
    write(source, out / "x.tar", 1 << 20)
    with pytest.raises(AlreadyExists):
        write(source, out / "x.tar", 1 << 20)
    with tarfile.open(out / "x.tar") as archive:
        assert archive.getnames() == ["long" * 60, "a", "a/file"]
    assert [path.name for path in out.iterdir()] == ["x.tar"]


def test_logs_of_failures_are_kept_by_their_end_and_the_last_of_them(tmp_path: Path) -> None:
    for number in range(20):
        work = tmp_path / f"work{number}"
        work.mkdir()
        written = work / "dump.log"
        written.write_bytes(b"x" * (3 << 20) + b"the end")
        with pytest.raises(ContainerError) as caught, criu_logs.kept(tmp_path, f"c{number}", written, limit="x"):
            raise ContainerError(f"criu failed\nlog file: {written}", code="unavailable", hint="look")
        written.unlink()
        copy = Path(str(caught.value).partition("log file: ")[2])
        assert copy.read_bytes().endswith(b"xthe end") and copy.stat().st_size == 1 << 20
        assert (caught.value.code, caught.value.hint) == ("unavailable", "look")
    assert len(list(criu_logs.directory(tmp_path).iterdir())) == 16
    with pytest.raises(ContainerError, match="^no answer\nlog file: .*/c-dump.log$") as late:
        written.write_bytes(b"slow")
        with criu_logs.kept(tmp_path, "c", written, limit="timeout"):
            raise ContainerError("no answer", code="deadline")
    assert late.value.hint == "timeout is that limit"
    with pytest.raises(ContainerError, match="^no such container$"), criu_logs.kept(tmp_path, "c", written, limit="x"):
        raise ContainerError("no such container", code="not_found")
