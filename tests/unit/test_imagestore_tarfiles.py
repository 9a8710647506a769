"""The index of image archives: every odd tar is understood or refused, at once, and no name leads anywhere."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagestore.model import ContentInvalid
from imagestore.tarfiles import Member, TarIndex
from tests.costs import within

_LONG = "x" * 60 + "/" + "y" * 80 + "/" + "z" * 190


def make(fill: Callable[[tarfile.TarFile], None], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        fill(tar)
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content), link
    tar.addfile(info, io.BytesIO(content))


def index(data: bytes, tmp_path: Path) -> TarIndex:
    path = tmp_path / "archive.tar"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return TarIndex(fd)
    finally:
        os.close(fd)


def content(data: bytes, member: Member | None) -> bytes:
    assert member is not None
    return data[member.offset : member.offset + member.size]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_every_kind(tmp_path: Path, form: int) -> None:
    long = _LONG if form != tarfile.USTAR_FORMAT else _LONG[:200]

    def fill(tar: tarfile.TarFile) -> None:
        add(tar, "./plain", b"one")
        add(tar, "dir", kind=tarfile.DIRTYPE)
        add(tar, long, b"two" * 1000)
        add(tar, "plain", b"the last wins")
        add(tar, "a/hard", kind=tarfile.LNKTYPE, link="plain")
        add(tar, "a/soft", kind=tarfile.SYMTYPE, link="../plain")
        add(tar, "a/loop", kind=tarfile.SYMTYPE, link="loop")
        add(tar, "a/gone", kind=tarfile.SYMTYPE, link="/../../../etc/passwd")
        add(tar, "a/fifo", kind=tarfile.FIFOTYPE)

    data = make(fill, form)
    found = index(data, tmp_path)
    assert content(data, found.find("plain")) == b"the last wins"
    assert content(data, found.find(long)) == b"two" * 1000
    assert found.find("a/hard") == found.find("a/soft") == found.find("/plain") == found.find("x/../plain")
    assert found.find("a/gone") is None and found.find("a/fifo") is None and found.find("dir") is None
    with pytest.raises(ContentInvalid, match="too many links"):
        found.find("a/loop")


def header(**changes: bytes) -> bytes:
    """A ustar header for "a" of 3 bytes with fields replaced and the checksum made right."""
    fields = {"name": b"a", "size": b"00000000003\0", "kind": b"0"} | changes
    block = bytearray(512)
    block[: len(fields["name"])] = fields["name"]
    block[124:136] = fields["size"]
    block[156:157] = fields["kind"]
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (header(size=b"77777777777\0") + b"abc", "ends in the middle"),
        (header(size=b"\xff" * 12) + b"abc", "negative or huge"),
        (header(size=b"\x80" + b"\x7f" * 11) + b"abc", "negative or huge"),
        (header(size=b"12345678999\0"), "not octal"),
        (header(size=b"-0000000001\0"), "not octal"),
        (header(kind=b"S") + b"abc".ljust(512), "sparse"),
        (header(kind=b"x") + b"abc".ljust(512), "malformed pax"),
        (header(kind=b"x", size=b"00000000012\0") + b"0 a=b\n0 a=b".ljust(512), "malformed pax"),
        (header(kind=b"x", size=b"00000000014\0") + b"12 size=-1 \n".ljust(512), "malformed pax"),
        (header()[:148] + b"0000000\0" + header()[156:], "no tar header at byte 0"),
        (b"\x1f\x8b" + b"a" * 600, "compressed"),
        (b"\x28\xb5\x2f\xfd" + b"a" * 600, "compressed"),
        (header(kind=b"L", size=b"00004000001\0") + b"a" * (1 << 20) + b"a" * 600, "a header of"),
        (header(size=b"00000000000\0") * 50_001, "more than 50000 members"),
    ],
)
def test_p5_refused(tmp_path: Path, data: bytes, says: str) -> None:
    with within(8000), pytest.raises(ContentInvalid, match=says):
        index(data, tmp_path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=6))
def test_p5_mutated(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        add(tar, "a" * 120, b"x" * 700)
        add(tar, "b", b"y")

    data = bytearray(make(fill))
    for at, value in changes:
        data[at % len(data)] = value
    try:
        found = index(bytes(data), tmp_path)
    except ContentInvalid:
        return
    for member in found._members.values():
        assert member.offset >= 0 and member.offset + member.size <= len(data)
