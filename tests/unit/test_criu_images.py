"""What is read of criu's images, and what is written in their place: filters and cgroups that are others'."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from runtime import criu
from runtime.criu_images import replace_cgroups, verify_filters
from runtime.errors import RuntimeFailure

MAGIC = b"IMG1kind"
OURS, OTHERS = b"program of config.json", b"allow everything"


def _image(path: Path, message: bytes) -> None:
    path.write_bytes(MAGIC + struct.pack("<I", len(message)) + message)


def _filters(directory: Path, *filters: tuple[bytes, int | None]) -> None:
    """Each a program and the number of the one that was loaded before it."""
    entries = [criu.message((1, raw), *([] if before is None else [(2, before)])) for raw, before in filters]
    _image(directory / "seccomp.img", criu.message((1, entries)))


def test_filters_that_processes_have_added_stand_on_the_containers_own(tmp_path: Path) -> None:
    _filters(tmp_path, (OURS, None))
    verify_filters(str(tmp_path), OURS)
    _filters(tmp_path, (OURS, None), (OTHERS, 0), (b"third", 1))
    verify_filters(str(tmp_path), OURS)


def test_s71_a_filter_that_is_another_is_refused(tmp_path: Path) -> None:
    for filters in ([(OTHERS, None)], [(OURS, None), (OTHERS, None)], [(OURS[:-1], None)], [(OTHERS, None), (OURS, 0)]):
        _filters(tmp_path, *filters)
        with pytest.raises(RuntimeFailure, match="is not the one that config.json describes"):
            verify_filters(str(tmp_path), OURS)
    _filters(tmp_path)
    with pytest.raises(RuntimeFailure, match="it has no seccomp filter"):
        verify_filters(str(tmp_path), OURS)


@pytest.mark.parametrize("raw", [b"", b"short", MAGIC + b"\xff\xff\xff\xff", MAGIC + bytes(4) + b"more"])
def test_s71_what_is_no_image_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "seccomp.img").write_bytes(raw)
    with pytest.raises(RuntimeFailure):
        verify_filters(str(tmp_path), OURS)
    (tmp_path / "cgroup.img").write_bytes(raw)
    with pytest.raises(RuntimeFailure):
        replace_cgroups(str(tmp_path), [("", "/pod/one")], own_namespace=True)


def test_s71_cgroups_are_the_containers_whatever_the_images_say(tmp_path: Path) -> None:
    evil = criu.message((1, "../../system.slice"), (4, criu.message((1, 0o777), (2, 1000), (3, 1000))))
    controller = criu.message((1, ["memory"]), (2, [evil]))
    sets = [criu.message((1, 7), (2, [criu.message((1, "memory"), (2, "/elsewhere"))])), criu.message((1, 9))]
    _image(tmp_path / "cgroup.img", criu.message((1, sets), (2, [controller])))
    replace_cgroups(str(tmp_path), [("cpu,cpuacct", "/pod/one"), ("memory", "/pod/two")], own_namespace=True)
    raw = (tmp_path / "cgroup.img").read_bytes()
    assert raw[:8] == MAGIC and struct.unpack("<I", raw[8:12]) == (len(raw) - 12,)
    assert b"elsewhere" not in raw and b"slice" not in raw
    found = criu.repeated(raw[12:], 1)
    assert [criu.fields(one)[1] for one in found] == [7, 9]
    for one in found:
        members = [criu.fields(member) for member in criu.repeated(one, 2)]
        assert members == [{1: b"cpu,cpuacct", 2: b"/pod/one", 3: 8}, {1: b"memory", 2: b"/pod/two", 3: 8}]
    controllers = criu.repeated(raw[12:], 2)
    assert [criu.repeated(one, 1) for one in controllers] == [[b"cpu", b"cpuacct"], [b"memory"]]
    assert not any(criu.repeated(one, 2) for one in controllers), "directories that criu would make and change"
    replace_cgroups(str(tmp_path), [("memory", "/pod/two")], own_namespace=False)
    (member,) = criu.repeated(criu.repeated((tmp_path / "cgroup.img").read_bytes()[12:], 1)[0], 2)
    assert criu.fields(member) == {1: b"memory", 2: b"/pod/two"}


def test_images_without_cgroups_are_left_alone(tmp_path: Path) -> None:
    replace_cgroups(str(tmp_path), [("memory", "/pod/one")], own_namespace=True)
    assert list(tmp_path.iterdir()) == []
