"""The tar walker: round trips with Python's writer, and input that wants to break it (threats S37, P1, P5, P6, P8)."""

from __future__ import annotations

import io
import random
import struct
import tarfile
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.model import Limits, UnpackError
from snapshotter.tar import CHAR, DIRECTORY, FIFO, FILE, LINK, SYMLINK, Entry, Walker
from snapshotter.tar_feed import Feed
from snapshotter.tar_fields import parse_pax
from tests.costs import within
from tests.fakes.snapshots import Member, device, directory, fifo, file, hardlink, symlink, tarball, xattrs

BLOCK = 512


def walker(raw: bytes, step: int = 1 << 20, limits: Limits | None = None) -> Walker:
    chunks = iter([raw[at : at + step] for at in range(0, len(raw), step)])
    return Walker(Feed(lambda: next(chunks, b"")), limits or Limits())


def walk(raw: bytes, step: int = 1 << 20, limits: Limits | None = None) -> list[tuple[Entry, bytes]]:
    reader = walker(raw, step, limits)
    return [(entry, b"".join(reader.data())) for entry in reader]


def header(
    name: bytes = b"f", size: int = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000", **fields: bytes
) -> bytes:
    """A raw header with a right checksum; `fields` override bytes at "oOFFSET"."""
    raw = bytearray(BLOCK)
    raw[: len(name)] = name
    raw[100:108], raw[108:116], raw[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    raw[124:136], raw[136:148] = b"%011o\0" % size, b"%011o\0" % 0
    raw[156:157], raw[257:265] = kind, magic
    for key, value in fields.items():
        at = int(key[1:])
        raw[at : at + len(value)] = value
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def special(kind: bytes, content: bytes) -> bytes:
    return header(b"././@x", len(content), kind) + content + bytes(-len(content) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


END = bytes(2 * BLOCK)


# ------------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("step", [1, 511, 512, 513, 10240, 1 << 20])
def test_every_kind_comes_back(form: int, step: int) -> None:
    raw = tarball(
        [
            directory("d", 0o1777, uid=7, gid=8),
            file("d/f", b"data" * 300, 0o4755, mtime=1234),
            symlink("s", "../x"),
            hardlink("h", "d/f"),
            device("c", 5, 1),
            fifo("p"),
        ],
        form,
    )
    entries = walk(raw, step)
    assert [entry.kind for entry, _ in entries] == [DIRECTORY, FILE, SYMLINK, LINK, CHAR, FIFO]
    assert [entry.name.rstrip(b"/") for entry, _ in entries] == [b"d", b"d/f", b"s", b"h", b"c", b"p"]
    (folder, _), (plain, data), (soft, _), (hard, _), (node, _), _ = entries
    assert (folder.mode, folder.uid, folder.gid) == (0o1777, 7, 8)
    assert (plain.mode, plain.mtime, data) == (0o4755, 1234 * 10**9, b"data" * 300)
    assert (soft.link, hard.link) == (b"../x", b"d/f")
    assert (node.major, node.minor) == (5, 1)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links(form: int) -> None:
    name, target = "n/" * 90 + "x" * 200, "t/" * 150 + "end"
    (entry, _), (soft, _) = walk(tarball([file(name), symlink("s", target)], form))
    assert entry.name == name.encode()
    assert soft.link == target.encode()


def test_ustar_prefix_is_joined() -> None:
    name = "a" * 90 + "/" + "b" * 90
    ((entry, _),) = walk(tarball([file(name)], tarfile.USTAR_FORMAT))
    assert entry.name == name.encode()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_p8_names_that_are_not_utf8_stay_bytes(form: int) -> None:
    raw = bytes(range(0x80, 0x100)).replace(b"/", b"")[:90]
    ((entry, _),) = walk(tarball([file(raw.decode("utf-8", "surrogateescape"))], form))
    assert entry.name == raw


def test_base256_numbers() -> None:
    members = [file("big", uid=2**31 + 5, gid=2**32 - 2, mtime=-5)]
    ((entry, _),) = walk(tarball(members, tarfile.GNU_FORMAT))
    assert (entry.uid, entry.gid, entry.mtime) == (2**31 + 5, 2**32 - 2, -5 * 10**9)


def test_pax_overrides() -> None:
    headers = {"mtime": "-1.000000002", "uid": "3000000000", "gid": "9", "path": "other", **xattrs(user__a=b"v=1\n")}
    ((entry, _),) = walk(tarball([file("f", pax_headers=headers)]))
    assert (entry.name, entry.mtime, entry.uid, entry.gid) == (b"other", -1_000_000_002, 3_000_000_000, 9)
    assert entry.xattrs == {b"user.a": b"v=1\n"}


def test_pax_size_rules_over_the_header() -> None:
    raw = special(b"x", record(b"size", b"3")) + header(size=0) + b"abc" + bytes(509) + END
    ((entry, data),) = walk(raw)
    assert (entry.size, data) == (3, b"abc")


def test_global_pax_records_apply_and_can_be_taken_back() -> None:
    raw = (
        special(b"g", record(b"uid", b"5") + record(b"gid", b"6"))
        + header(b"a")
        + special(b"x", record(b"uid", b""))
        + header(b"b")
        + END
    )
    (one, _), (two, _) = walk(raw)
    assert (one.uid, one.gid, two.uid, two.gid) == (5, 6, 0, 6)


@pytest.mark.parametrize("key", [b"path", b"linkpath", b"size", b"GNU.sparse.map"])
def test_global_names_and_sizes_are_refused(key: bytes) -> None:
    with pytest.raises(UnpackError, match="global pax header"):
        walk(special(b"g", record(key, b"1")) + header() + END)


def test_a_trailing_slash_makes_a_directory_of_the_oldest_type_only() -> None:
    ((entry, _),) = walk(header(b"d/", kind=b"\0", magic=bytes(8)) + END)
    assert entry.kind == DIRECTORY
    ((entry, _),) = walk(header(b"d/") + END)
    assert entry.kind == FILE


def test_gnu_long_names_win_over_pax() -> None:
    raw = special(b"L", b"gnu\0") + special(b"x", record(b"path", b"pax")) + header(b"own") + END
    assert walk(raw)[0][0].name == b"gnu"


def test_a_global_header_inside_an_entry_is_refused() -> None:
    with pytest.raises(UnpackError, match="global"):
        walk(special(b"x", record(b"path", b"p")) + special(b"g", record(b"uid", b"1")) + header() + END)


def test_end_without_marker_and_data_after_it() -> None:
    assert len(walk(header(b"a") + header(b"b"))) == 2
    reader = walker(header(b"a") + END + b"trailing" * 1000)
    assert len(list(reader)) == 1
    assert reader.feed.position == 3 * BLOCK + 8000


def test_signed_checksums_of_old_tars_are_accepted() -> None:
    raw = bytearray(header(b"\xff\xfe"))
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(struct.unpack("512b", raw))
    assert walk(bytes(raw) + END)[0][0].name == b"\xff\xfe"


def test_data_left_by_the_consumer_is_skipped() -> None:
    reader = walker(tarball([file("a", b"x" * 70000), file("b", b"y")]), 512)
    seen = []
    for entry in reader:
        if entry.name == b"a":
            next(reader.data())
        else:
            seen.append(b"".join(reader.data()))
    assert seen == [b"y"]


# --------------------------------------------------------------------------------------------------------- sparse

REGIONS = [(0, 5), (1 << 20, 600), (3 << 20, 1)]
SPARSE_DATA = b"A" * 5 + b"B" * 600 + b"C"
REAL = 4 << 20


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def _old_gnu() -> bytes:
    many = [(at * 4096, 10) for at in range(30)]
    table = b"".join(b"%011o\0%011o\0" % pair for pair in many)
    rest = table[96:]
    blocks = b""
    while rest:
        piece, rest = rest[: 21 * 24], rest[21 * 24 :]
        blocks += piece.ljust(504, b"\0") + (b"\1" if rest else b"\0") + bytes(7)
    head = header(b"s", 300, b"S", b"ustar  \0", o386=table[:96], o482=b"\1", o483=b"%011o\0" % (30 * 4096))
    return head + blocks + _padded(b"d" * 300) + END


def _pax00() -> bytes:
    records = record(b"GNU.sparse.size", str(REAL).encode()) + record(b"GNU.sparse.numblocks", b"3")
    for offset, length in REGIONS:
        records += record(b"GNU.sparse.offset", str(offset).encode()) + record(
            b"GNU.sparse.numbytes", str(length).encode()
        )
    return special(b"x", records) + header(b"s", len(SPARSE_DATA)) + _padded(SPARSE_DATA) + END


def _pax01() -> bytes:
    packed = ",".join(f"{offset},{length}" for offset, length in REGIONS).encode()
    records = (
        record(b"GNU.sparse.name", b"s")
        + record(b"GNU.sparse.size", str(REAL).encode())
        + record(b"GNU.sparse.numblocks", b"3")
        + record(b"GNU.sparse.map", packed)
    )
    return special(b"x", records) + header(b"GNUSparseFile.0/s", len(SPARSE_DATA)) + _padded(SPARSE_DATA) + END


def _pax10(count: bytes = b"3") -> bytes:
    text = count + b"\n" + b"".join(b"%d\n%d\n" % pair for pair in REGIONS)
    records = (
        record(b"GNU.sparse.major", b"1")
        + record(b"GNU.sparse.minor", b"0")
        + record(b"GNU.sparse.name", b"s")
        + record(b"GNU.sparse.realsize", str(REAL).encode())
    )
    data = _padded(text) + SPARSE_DATA
    return special(b"x", records) + header(b"GNUSparseFile.0/s", len(data)) + _padded(data) + END


@pytest.mark.parametrize("make", [_pax00, _pax01, _pax10])
def test_gnu_sparse_in_pax(make: Callable[[], bytes]) -> None:
    ((entry, data),) = walk(make())
    assert (entry.name, entry.size, entry.stored, data) == (b"s", REAL, len(SPARSE_DATA), SPARSE_DATA)
    assert entry.regions == REGIONS


def test_old_gnu_sparse_with_continuation_blocks() -> None:
    ((entry, data),) = walk(_old_gnu())
    assert (entry.size, entry.stored, len(data), len(entry.regions or [])) == (30 * 4096, 300, 300, 30)


def _mapped(packed: bytes, size: int = 10, real: int = 100) -> bytes:
    records = record(b"GNU.sparse.size", str(real).encode()) + record(b"GNU.sparse.map", packed)
    return special(b"x", records) + header(b"s", size) + _padded(b"x" * size) + END


@pytest.mark.parametrize(
    "packed",
    [b"5,5,0,5", b"0,5,4,5", b"95,10", b"0,9", b"0,11", b"0", b"0,-1,5,11", b"0,5,x,5", b"0,1_0", "0,１".encode()],
)
def test_s37_sparse_maps_that_lie(packed: bytes) -> None:
    with pytest.raises(UnpackError):
        walk(_mapped(packed))


def test_s37_a_small_header_that_claims_a_billion_regions() -> None:
    with pytest.raises(UnpackError, match="sparse_regions"):
        walk(_pax10(b"1000000000"))
    endless = header(b"s", 0, b"S", b"ustar  \0", o386=b"%011o\0%011o\0" % (0, 0) * 4, o482=b"\1", o483=b"%011o\0" % 9)
    block = b"%011o\0%011o\0" % (0, 0) * 21 + b"\1" + bytes(7)
    chunks = iter([endless])
    with pytest.raises(UnpackError, match="sparse_regions"):
        list(Walker(Feed(lambda: next(chunks, block * 64)), Limits()))


def test_s37_empty_continuation_blocks_count_as_entries() -> None:
    endless = header(b"s", 0, b"S", b"ustar  \0", o482=b"\1", o483=b"%011o\0" % 9)
    block = bytes(504) + b"\1" + bytes(7)
    chunks = iter([endless])
    with pytest.raises(UnpackError, match="limit entries"):
        list(Walker(Feed(lambda: next(chunks, block * 64)), Limits(entries=5000)))


# ---------------------------------------------------------------------------------------------------------- limits


def _sized(size: int) -> bytes:
    """An entry that says so in its header, in base 256: 8 EiB are beyond what octal digits can say."""
    entry = tarfile.TarInfo("f")
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT) + END


@pytest.mark.parametrize(
    ("raw", "limits", "named"),
    [
        (header() * 4 + END, Limits(entries=3), "entries"),
        (special(b"x", record(b"a", b"b" * 2000)) + header() + END, Limits(pax_bytes=1024), "pax_bytes"),
        (header(b"p", 1 << 32, b"x"), Limits(), "pax_bytes"),
        (header(b"l", 1 << 30, b"L"), Limits(), "path_bytes"),
        (special(b"x", record(b"path", b"p" * 5000)) + header() + END, Limits(), "path_bytes"),
        (special(b"x", record(b"linkpath", b"p" * 5000)) + header(kind=b"2") + END, Limits(), "path_bytes"),
        (
            special(b"x", b"".join(record(b"SCHILY.xattr.user.%d" % n, b"v") for n in range(9))) + header() + END,
            Limits(xattrs=8),
            "xattrs",
        ),
        (special(b"x", record(b"size", str(1 << 60).encode())) + header() + END, Limits(), "file_bytes"),
        (special(b"x", record(b"size", str(1 << 63).encode())) + header() + END, Limits(), "file_bytes"),
        (_sized(1 << 63), Limits(), "file_bytes"),
        (
            b"".join(special(b"g", record(b"k%d" % n, b"v" * 300)) for n in range(10)) + header() + END,
            Limits(pax_bytes=1024),
            "pax_bytes",
        ),
    ],
)
def test_s37_limits_are_named(raw: bytes, limits: Limits, named: str) -> None:
    with pytest.raises(UnpackError, match=f"limit {named}"):
        walk(raw, limits=limits)


# ----------------------------------------------------------------------------------------------------- bad headers


@pytest.mark.parametrize(
    "raw",
    [
        header()[:-1] + b"x" + END,  # checksum
        header(o100=b"00o0644\0"),
        header(o108=b"+000001\0"),
        header(o108=b"-000001\0"),
        header(o124=b"0000000_0000"),
        header(o124=b"00000000008\0"),
        header(o108=b"\xff" + b"\xff" * 7),  # negative owner
        header(o124=b"\xff" * 12),  # negative size
        header(kind=b"Z"),
        header(kind=b"M"),
        header(magic=b"ustar\x01zz"),
        header(size=6000) + b"x" * 512,  # data missing
        header()[:100],  # half a header
        special(b"x", record(b"path", b"x")),  # nothing after it
        special(b"x", b"6 a=\n") + header(),
        special(b"x", b"99 a=b\n") + header(),
        special(b"x", b"-6 a=b\n") + header(),
        special(b"x", b"6 a=bb") + header(),
        special(b"x", b"6 ab\n\n") + header(),
        special(b"x", b"5 =b\n") + header(),
        special(b"x", "６ a=b\n".encode()) + header(),
        special(b"x", b"9" * 600) + header(),
        special(b"x", record(b"path", b"a\0b")) + header(),
        special(b"x", record(b"SCHILY.xattr.", b"v")) + header(),
        special(b"x", record(b"uid", b"-1")) + header(),
        special(b"x", record(b"uid", b"4294967295")) + header(),
        special(b"x", record(b"uid", b"1_0")) + header(),
        special(b"x", record(b"uid", b"9" * 5000)) + header(),
        special(b"x", record(b"mtime", b"1.2.3")) + header(),
        special(b"x", record(b"mtime", b"nan")) + header(),
        special(b"x", record(b"mtime", b"1." + b"9" * 5000)) + header(),
        header() + bytes(512) + header(),
    ],
)
def test_p5_p6_malformed_headers_are_refused(raw: bytes) -> None:
    with pytest.raises(UnpackError):
        walk(raw + (END if len(raw) % BLOCK == 0 else b""))


def test_pax_records_of_a_megabyte_parse_in_linear_time() -> None:
    with within(20_000):
        assert len(parse_pax(b"".join(record(b"k%d" % n, b"") for n in range(80_000)))) == 80_000
        with pytest.raises(UnpackError):
            parse_pax(b"1" * (1 << 20))


# --------------------------------------------------------------------------------------------------- property tests


def _members() -> st.SearchStrategy[list[Member]]:
    names = st.text(st.characters(blacklist_characters="\0/", blacklist_categories=("Cs",)), min_size=1, max_size=120)
    paths = st.lists(names.filter(lambda name: name not in (".", "..")), min_size=1, max_size=5).map("/".join)
    whole = st.integers(0, 2**31)
    files = st.builds(
        lambda path, data, mode, uid, mtime: file(path, data, mode, uid=uid, mtime=mtime),
        paths,
        st.binary(max_size=3000),
        st.integers(0, 0o7777),
        whole,
        whole,
    )
    links = st.builds(symlink, paths, paths) | st.builds(hardlink, paths, paths)
    return st.lists(files | links | st.builds(directory, paths, st.integers(0, 0o7777)), max_size=12)


@settings(deadline=None, max_examples=150)
@given(_members(), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.integers(1, 4096))
def test_random_trees_come_back(members: list[Member], form: int, step: int) -> None:
    entries = walk(tarball(members, form), step)
    assert len(entries) == len(members)
    for (info, data), (entry, read) in zip(members, entries, strict=True):
        assert entry.name.rstrip(b"/") == info.name.encode()
        assert entry.link == info.linkname.encode()
        assert (entry.mode, entry.uid, entry.mtime) == (info.mode, info.uid, info.mtime * 10**9)
        assert read == (data if info.isreg() else b"")


def _seeds() -> list[bytes]:
    plain = tarball(
        [
            directory("d"),
            file("d/" + "n" * 150, b"x" * 700, pax_headers=xattrs(user__a=b"1")),
            symlink("s", "t" * 150),
            device("c", 1, 3),
        ]
    )
    return [plain, tarball([file("a" * 300, b"z")], tarfile.GNU_FORMAT), _old_gnu(), _pax00(), _pax01(), _pax10()]


def _survives(raw: bytes, step: int = 4096) -> None:
    with within(8000):
        try:
            walk(raw, step)
        except UnpackError as error:
            assert str(error)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=4096))
def test_p5_noise_is_an_unpack_error_or_a_tar(raw: bytes) -> None:
    _survives(raw)
    _survives(header(kind=b"x", size=len(raw)) + raw + bytes(-len(raw) % BLOCK) + header() + END)


def _mutated(dice: random.Random, seeds: list[bytes]) -> Iterator[bytes]:
    while True:
        raw = bytearray(dice.choice(seeds))
        for _ in range(dice.randint(1, 6)):
            start = dice.randrange(len(raw) // BLOCK) * BLOCK
            at = start + dice.choice([dice.randrange(BLOCK), 124 + dice.randrange(12), 156, 345 + dice.randrange(155)])
            raw[at % len(raw)] = dice.choice([0, 32, 45, 48, 55, 57, 61, 10, 128, 255, dice.randrange(256)])
            if dice.random() < 0.8 and start + BLOCK <= len(raw):  # a right checksum lets the rest be reached
                raw[start + 148 : start + 156] = b" " * 8
                raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + BLOCK])
        yield bytes(raw[: dice.randrange(len(raw))]) if dice.random() < 0.1 else bytes(raw)


def test_p5_ten_thousand_mutated_headers() -> None:
    mutations = _mutated(random.Random(20250725), _seeds())
    for _ in range(10_000):
        _survives(next(mutations), 1 << 20)


def test_production_code_does_not_use_tarfile_p1() -> None:
    from pathlib import Path  # noqa: PLC0415

    for path in (Path(__file__).parents[2] / "snapshotter").glob("*.py"):
        for line in io.StringIO(path.read_text()):
            assert not line.startswith(("import tarfile", "from tarfile")), path
