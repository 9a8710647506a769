"""The parts of conformance that judge others: layers that come out the same, verdicts, and what counts as a leak."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.bench.table import METRICS, Metric, render, verdict
from conformance.images.layer import GZIP, NONE, ZSTD, Entry, directory, file, hardlink, opaque, whiteout, write_layer
from conformance.images.layout import Config, Layout
from conformance.images.recipes import odd_entries
from conformance.leaks import Machine, Process, left_over
from conformance.vm.selection import LEFT_OUT, RUNTIME


@pytest.mark.parametrize("compression", [GZIP, ZSTD, NONE])
def test_the_same_entries_give_the_same_layer(tmp_path: Path, compression: str) -> None:
    lower, _ = odd_entries()
    one, two = (write_layer(lower, tmp_path / name, compression) for name in "ab")
    assert (one.digest, one.diff_id, one.size) == (two.digest, two.diff_id, two.size)
    data = (tmp_path / "a").read_bytes()
    assert one.digest == f"sha256:{hashlib.sha256(data).hexdigest()}" and one.size == len(data)


def test_a_layer_holds_what_its_entries_say(tmp_path: Path) -> None:
    entries = [
        directory("d", 0o1777),
        file("d/f", "x", 0o4755, uid=7, gid=8),
        hardlink("d/l", "d/f", 0o4755),
        whiteout("d/gone"),
        opaque("d"),
        Entry("xattr", xattrs={"user.a": b"b"}),
    ]
    layer = write_layer(entries, tmp_path / "layer", NONE)
    assert layer.digest == layer.diff_id
    with tarfile.open(layer.path) as tar:
        members = {member.name: member for member in tar}
        assert members["d/f"].mode == 0o4755 and (members["d/f"].uid, members["d/f"].gid) == (7, 8)
        assert members["d/l"].islnk() and members["d/l"].linkname == "d/f"
        assert {"d/.wh.gone", "d/.wh..wh..opq"} <= members.keys()
        assert members["xattr"].pax_headers["SCHILY.xattr.user.a"] == "b"
        assert all(member.mtime == 0 for member in members.values())


def test_a_layout_names_every_blob_by_its_digest(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layer = write_layer([file("a", "b")], layout.scratch() / "0")
    layout.add_image("one:1", [layer], Config(cmd=["a"]))
    layout.add_image("two:1", [replace(layer, path=tmp_path / "layout/blobs/sha256" / layer.digest[7:])], Config())
    root = layout.finish()
    for blob in (root / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    index = json.loads((root / "index.json").read_text())
    assert [one["annotations"]["org.opencontainers.image.ref.name"] for one in index["manifests"]] == ["one:1", "two:1"]
    assert not (root / "scratch").exists()


LESS, MORE = Metric("a", "a", "ms", 40, 300), Metric("b", "b", "/s", 40, 5, more_is_better=True)


@pytest.mark.parametrize(
    ("metric", "ocid", "peer", "expected"),
    [
        (LESS, 39, 300, "PASS"),
        (LESS, 41, 300, "FAIL"),
        (LESS, 60, 600, "PASS (ratio)"),
        (LESS, 41, None, "FAIL"),
        (MORE, 41, 5, "PASS"),
        (MORE, 39, 5, "FAIL"),
        (MORE, 20, 2, "PASS (ratio)"),
        (Metric("c", "c", "ms"), 1, 1, ""),
    ],
)
def test_verdicts(metric: Metric, ocid: float, peer: float | None, expected: str) -> None:
    assert verdict(metric, ocid, peer) == expected


def test_the_table_counts_what_was_missed() -> None:
    table, missed = render({"containerd": {"pod_up": 300, "exec": 40}, "ocid": {"pod_up": 39, "exec": 90}})
    assert missed == 1 and table.count("FAIL") == 1 and "| 0.130 |" in table
    assert len({metric.key for metric in METRICS}) == len(METRICS)


NOTHING = Machine((), frozenset(), frozenset(), frozenset(), frozenset(), frozenset())


def test_what_was_there_before_is_not_left_over() -> None:
    before = replace(NOTHING, mounts=("/a (tmpfs x)", "/a (tmpfs x)"), links=frozenset({"eth0"}))
    assert left_over(before, before) == []
    once_more = replace(before, mounts=(*before.mounts, "/a (tmpfs x)"))
    assert left_over(before, once_more) == ["mount /a (tmpfs x)"]


def test_marks_leave_out_what_others_make() -> None:
    after = replace(
        NOTHING,
        mounts=("/tmp/mine/m (tmpfs x)", "/tmp/theirs/m (tmpfs x)"),
        cgroups=frozenset({"/sys/fs/cgroup/mine-1", "/sys/fs/cgroup/theirs"}),
        links=frozenset({"theirs0"}),
        processes=frozenset({Process(1 << 30, 5, 1, "theirs", "sleep 1"), Process(2 << 30, 5, 1, "x", "run mine")}),
    )
    found = left_over(NOTHING, after, ["mine"])
    assert [line.split()[0] for line in found] == ["mount", "cgroup", "process"]
    assert not [line for line in found if "theirs" in line]


def test_a_child_of_ours_is_seen_whatever_it_is_called() -> None:
    before = Machine.now()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = left_over(before, Machine.now(), ["no such mark"])
        assert any(line.startswith(f"process {child.pid} ") for line in found), found
    finally:
        child.communicate(b"\n")
    assert f"process {child.pid} " not in str(left_over(before, Machine.now(), ["no such mark"]))


def test_who_was_there_before_is_not_looked_at_again_and_who_was_not_is() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        before = Machine.now()
        told = replace(before, processes=frozenset(replace(one, name="as told") for one in before.processes))
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as another:
            names = {one.pid: one.name for one in Machine.now(since=told).processes}
            another.communicate(b"\n")
        assert names[child.pid] == names[os.getpid()] == "as told" != names[another.pid]
        others = frozenset(replace(one, inode=one.inode + 1, name="another") for one in before.processes)
        names = {one.pid: one.name for one in Machine.now(since=replace(before, processes=others)).processes}
        assert "another" not in (names[child.pid], names[os.getpid()])  # a pid is used again, its directory is not
    finally:
        child.communicate(b"\n")


def test_what_a_machine_does_on_its_own_is_not_ours() -> None:
    logrotate = Process(os.getppid(), 0, 1, "logrotate", "logrotate /etc/logrotate.conf")
    shim = Process(1 << 30, 5, 1, "shim 0123", "python")
    found = left_over(NOTHING, replace(NOTHING, processes=frozenset({logrotate, shim})))
    assert found == [f"process {1 << 30} (shim 0123): python"]


def test_who_has_ended_counts_unless_only_init_can_wait_for_it() -> None:
    running = Process(1 << 30, 5, 1, "shim", "")
    after = replace(NOTHING, processes=frozenset({running}))
    assert left_over(NOTHING, after) != []
    assert left_over(NOTHING, replace(after, processes=frozenset({replace(running, ended=True)}))) == []

    before = Machine.now()
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = {one.pid: one for one in Machine.now().processes}[child.pid]
    assert found.ended and found.parent == os.getpid()
    assert f"process {child.pid} " in str(left_over(before, Machine.now()))
    child.wait()


def test_every_test_of_the_runtime_is_chosen_for_the_virtual_machine_or_left_out_for_a_reason() -> None:
    files = (Path(__file__).parents[1] / "integration").glob("test_runtime_*.py")
    texts = {path.stem.removeprefix("test_runtime_"): path.read_text() for path in files}
    assert sorted([*RUNTIME, *LEFT_OUT]) == sorted(texts)
    assert [one for name, chosen in RUNTIME.items() for one in chosen if f"\ndef {one}(" not in texts[name]] == []
