"""What an unpacked layer is, looked at on disk and through a real overlay mount."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.linux.mount import FsMount, move_mount, umount2
from snapshotter.model import Config, UnpackError
from snapshotter.overlay import Overlay
from tests.fakes.snapshots import (
    Blob,
    Member,
    blob,
    device,
    directory,
    fifo,
    file,
    hardlink,
    opaque,
    symlink,
    tarball,
    whiteout,
    xattrs,
)
from tests.support import needs

OPAQUE = "trusted.overlay.opaque"


@pytest.fixture(params=[0, 1], ids=["in process", "worker"])
def overlay(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Overlay]:
    needs("root", "overlay")
    made = open_overlay(tmp_path, workers=request.param)
    yield made
    made.close()


def open_overlay(path: Path, **config: object) -> Overlay:
    db = sqlite3.connect(path / "db", check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    return Overlay(path / "root", db, Config(**config))  # type: ignore[arg-type]


@contextmanager
def mounted(mount: FsMount, target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    fd, place = mount.make(), os.open(target, os.O_PATH)
    try:
        move_mount(fd, place)
    finally:
        os.close(fd)
        os.close(place)
    try:
        yield target
    finally:
        umount2(str(target))


Stack = Callable[..., Blob]


@pytest.fixture
def stack(overlay: Overlay, tmp_path: Path) -> Stack:
    """Unpacks layers one on the other and returns the topmost."""

    def unpack(*layers: list[Member] | bytes, parent: Blob | None = None) -> Blob:
        for members in layers:
            parent = blob(tmp_path, members, parent=parent)
            overlay.unpack_layer(*parent.arguments())
        assert parent is not None
        return parent

    return unpack


def top(overlay: Overlay, layer: Blob) -> Path:
    return overlay.lower_directories(layer.chain_id)[0]


def listing(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def test_modes_owners_times_links_and_nodes(overlay: Overlay, stack: Stack) -> None:
    layer = stack(
        [
            directory("d", 0o2775, uid=3, gid=50, mtime=111),
            file("d/suid", b"x" * 5000, 0o6755, uid=7, gid=8, mtime=222),
            file("d/plain", b"", 0o640, mtime=333, pax_headers={"mtime": "333.000000007"}),
            symlink("d/soft", "/nowhere/at all", uid=5, gid=6, mtime=444),
            hardlink("d/hard", "d/suid"),
            hardlink("d/hardsoft", "d/soft"),
            device("d/null", 1, 3, mode=0o666, uid=9, mtime=555),
            device("d/disk", 8, 1, tarfile.BLKTYPE),
            fifo("d/pipe", 0o622),
        ]
    )
    root = top(overlay, layer) / "d"
    status = {name: os.lstat(root / name) for name in os.listdir(root)}
    here = os.stat(root)
    assert (stat.S_IMODE(here.st_mode), here.st_uid, here.st_gid, here.st_mtime) == (0o2775, 3, 50, 111)
    suid = status["suid"]
    assert (stat.S_IMODE(suid.st_mode), suid.st_uid, suid.st_gid, suid.st_mtime) == (0o6755, 7, 8, 222)
    # A set-gid parent passes its group on to what is made in it: not here.
    assert (status["plain"].st_gid, status["plain"].st_mtime_ns) == (0, 333 * 10**9 + 7)
    assert (os.readlink(root / "soft"), status["soft"].st_uid, status["soft"].st_mtime) == ("/nowhere/at all", 5, 444)
    assert status["hard"].st_ino == suid.st_ino
    assert status["hardsoft"].st_ino == status["soft"].st_ino
    null = status["null"]
    assert (stat.S_ISCHR(null.st_mode), null.st_rdev, stat.S_IMODE(null.st_mode), null.st_uid, null.st_mtime) == (
        True,
        os.makedev(1, 3),
        0o666,
        9,
        555,
    )
    assert (stat.S_ISBLK(status["disk"].st_mode), status["disk"].st_rdev) == (True, os.makedev(8, 1))
    assert stat.S_ISFIFO(status["pipe"].st_mode)
    assert stat.S_IMODE(status["pipe"].st_mode) == 0o622


def test_xattrs_are_set_but_for_those_that_steer_overlayfs(overlay: Overlay, stack: Stack) -> None:
    capability = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
    wanted = xattrs(
        security__capability=capability,
        user__mine=b"\x00\xff1",
        trusted__kept=b"k",
        trusted__overlay__redirect=b"/etc",
        trusted__overlay__opaque=b"y",
        trusted__ocid__link=b"/etc/shadow",
        security__selinux=b"system_u:object_r:x:s0",
    )
    layer = stack([directory("d", pax_headers=wanted), file("d/f", b"x", pax_headers=wanted)])
    for path in (top(overlay, layer) / "d", top(overlay, layer) / "d/f"):
        names = set(os.listxattr(path))
        expected = {"security.capability", "user.mine", "trusted.kept"}
        assert names >= expected, path
        assert not names & {
            "trusted.overlay.redirect",
            "trusted.overlay.opaque",
            "trusted.ocid.link",
            "security.selinux",
        }
        assert os.getxattr(path, "user.mine") == b"\x00\xff1"
        assert os.getxattr(path, "security.capability") == capability


def test_a_default_acl_is_not_passed_on_and_links_keep_trusted_xattrs(overlay: Overlay, stack: Stack) -> None:
    entries = [(0x01, 7), (0x04, 7), (0x10, 7), (0x20, 0)]  # user, group, mask, other (linux/posix_acl_xattr.h)
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, perm, 0xFFFFFFFF) for tag, perm in entries)
    layer = stack(
        [
            directory("d", pax_headers=xattrs(system__posix_acl_default=acl)),
            file("d/f", b"x", 0o644),
            directory("d/e", 0o711),
            symlink("d/s", "f", pax_headers=xattrs(trusted__kept=b"1", user__dropped=b"1")),
            device("d/n", 1, 3, pax_headers=xattrs(trusted__kept=b"2")),
        ]
    )
    root = top(overlay, layer) / "d"
    assert os.getxattr(root, "system.posix_acl_default") == acl
    assert stat.S_IMODE((root / "f").stat().st_mode) == 0o644
    assert os.listxattr(root / "f") == []
    assert (stat.S_IMODE((root / "e").stat().st_mode), os.listxattr(root / "e")) == (0o711, [])
    assert os.listxattr(root / "s", follow_symlinks=False) == ["trusted.kept"]
    assert os.getxattr(root / "n", "trusted.kept") == b"2"


def test_sparse_files_stay_sparse(overlay: Overlay, stack: Stack) -> None:
    packed = "0,5,1048576,600,3145728,1"
    headers = {"GNU.sparse.map": packed, "GNU.sparse.size": str(64 << 20), "GNU.sparse.name": "s"}
    layer = stack([file("x", b"A" * 5 + b"B" * 600 + b"C", pax_headers=headers)])
    path = top(overlay, layer) / "s"
    status = os.stat(path)
    assert status.st_size == 64 << 20
    assert status.st_blocks * 512 < 1 << 20
    with path.open("rb") as data:
        assert data.read(6) == b"AAAAA\0"
        data.seek(1 << 20)
        assert data.read(601) == b"B" * 600 + b"\0"
        data.seek(3 << 20)
        assert data.read(2) == b"C\0"


def test_p8_names_and_long_names(overlay: Overlay, stack: Stack) -> None:
    raw = bytes(range(0x80, 0xC0))
    long = "/".join(["n" * 200] * 6)
    layer = stack([file(raw.decode("utf-8", "surrogateescape"), b"raw"), directory(long), file(f"{long}/{'f' * 255}")])
    assert os.listdir(os.fsencode(top(overlay, layer)))[0] in (raw, b"n" * 200)
    assert (Path(os.fsdecode(os.fsencode(top(overlay, layer)) + b"/" + raw))).read_bytes() == b"raw"
    assert (top(overlay, layer) / long / ("f" * 255)).is_file()


def test_names_that_differ_by_case_are_different(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    """A link never stands for a directory that is spelled otherwise, in one layer or over two."""
    outside = tmp_path / "outside"
    outside.mkdir()
    below = [file("README", b"1"), file("readme", b"2"), symlink("DIR", str(outside)), file("dir/x", b"3")]
    layer = stack(below, [file("Dir/x", b"4"), whiteout("ReadMe")])
    base = overlay.lower_directories(layer.chain_id)[1]
    assert {path.name: path.read_bytes() for path in base.iterdir() if path.name.lower() == "readme"} == {
        "README": b"1",
        "readme": b"2",
    }
    assert (base / "dir/x").read_bytes() == b"3" and (base / "DIR").is_symlink()
    assert listing(top(overlay, layer)) == ["Dir", "Dir/x", "ReadMe"] and list(outside.iterdir()) == []


def test_later_entries_replace_earlier_ones(overlay: Overlay, stack: Stack) -> None:
    layer = stack(
        [
            file("f", b"old"),
            file("f", b"new", 0o600),
            directory("d"),
            file("d/x"),
            file("d", b"was a directory"),
            file("e", b"was a file"),
            directory("e", 0o711),
            file("e/y"),
            symlink("s", "f"),
            file("s", b"not through the link"),
            directory("keep", 0o700),
            file("keep/z"),
            directory("keep", 0o755, uid=4),
            file("l", b"l"),
            hardlink("f2", "f"),
            hardlink("f2", "l"),
        ]
    )
    root = top(overlay, layer)
    assert (root / "f").read_bytes() == b"new"
    assert (root / "d").read_bytes() == b"was a directory"
    assert stat.S_IMODE((root / "e").stat().st_mode) == 0o711
    assert (root / "e/y").is_file()
    assert (root / "s").read_bytes() == b"not through the link"
    assert (root / "keep/z").is_file()
    assert (root / "keep").stat().st_uid == 4
    assert (root / "f2").samefile(root / "l")


def test_names_are_cleaned_as_everybody_does(overlay: Overlay, stack: Stack) -> None:
    layer = stack([directory("./"), file("/abs", b"1"), file("./dot/./b//c", b"2"), file("dot/../up", b"3")])
    assert listing(top(overlay, layer)) == ["abs", "dot", "dot/b", "dot/b/c", "up"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", "/..", "a/b/../../.."])
def test_names_that_leave_the_root_are_refused(overlay: Overlay, tmp_path: Path, name: str) -> None:
    with pytest.raises(UnpackError, match="leaves the root"):
        overlay.unpack_layer(*blob(tmp_path, [file(name, b"x")]).arguments())
    assert leftovers(overlay, tmp_path) == []


def leftovers(overlay: Overlay, tmp_path: Path) -> list[str]:
    """Directories in the snapshotter's root that no committed layer or snapshot has."""
    return [f"{kind}/{name}" for kind in ("layers", "active", "trash") for name in os.listdir(tmp_path / "root" / kind)]


@pytest.mark.parametrize(
    "member",
    [
        file("a/.wh.", b""),
        file(".wh..", b""),
        file(".wh...", b""),
        file(".wh.d/x", b""),
        hardlink("h", "missing"),
        hardlink("h", "../../etc/passwd"),
        hardlink("h", "/"),
        hardlink("h", "h"),
        symlink("s", ""),
        device("c", 4096, 0),
        device("c", 0, 1 << 20),
        file("x" * 256),
        file("."),
        symlink("/", "x"),
        file("a/" * 600 + "deep"),
        file("f", uid=2**32 - 1),
    ],
)
def test_refused_entries_are_named_and_leave_nothing(overlay: Overlay, tmp_path: Path, member: Member) -> None:
    layer = blob(tmp_path, tarball([directory("d"), file("d/f"), member], tarfile.GNU_FORMAT))
    with pytest.raises(UnpackError, match="tar"):
        overlay.unpack_layer(*layer.arguments())
    assert not overlay.has_layer(layer.chain_id)
    assert leftovers(overlay, tmp_path) == []


# ---------------------------------------------------------------------------------------- layers on top of each other


def test_whiteouts_and_opaque_directories(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    lower = [
        directory("a"),
        file("a/gone"),
        file("a/stays"),
        directory("b"),
        file("b/hidden"),
        directory("c"),
        file("c/x"),
    ]
    upper = [whiteout("a/gone"), opaque("b"), file("b/new"), whiteout("c"), directory("c"), file("c/y")]
    layer = stack(lower, upper)
    path = top(overlay, layer)
    gone = os.lstat(path / "a/gone")
    assert (stat.S_ISCHR(gone.st_mode), gone.st_rdev) == (True, 0)
    assert os.getxattr(path / "b", OPAQUE) == b"y"
    with mounted(overlay.prepare("c", layer.chain_id), tmp_path / "m") as root:
        assert listing(root) == ["a", "a/stays", "b", "b/new", "c", "c/y"]


def test_whiteout_after_the_new_directory_hides_the_old_one(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    layer = stack(
        [directory("c"), file("c/x"), file("f")],
        [directory("c"), file("c/y"), whiteout("c"), file("f", b"2"), whiteout("f")],
    )
    with mounted(overlay.prepare("c", layer.chain_id), tmp_path / "m") as root:
        assert listing(root) == ["c", "c/y", "f"]
        assert (root / "f").read_bytes() == b"2"


def test_whiteout_of_a_directory_and_new_things_in_it(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    layer = stack([directory("c"), file("c/x")], [whiteout("c"), file("c/y")])
    with mounted(overlay.prepare("c", layer.chain_id), tmp_path / "m") as root:
        assert listing(root) == ["c", "c/y"]


def test_opaque_root_hides_every_layer_below(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    layer = stack([file("old")], [opaque(""), file("new")], [file("newer")])
    assert len(overlay.lower_directories(layer.chain_id)) == 2
    with mounted(overlay.prepare("c", layer.chain_id), tmp_path / "m") as root:
        assert listing(root) == ["new", "newer"]


def test_whiteouts_of_a_base_layer_are_not_made(overlay: Overlay, stack: Stack) -> None:
    layer = stack([directory("d"), whiteout("d/x"), opaque("d"), file("d/.wh..wh.plnk/1.2", b""), file("d/f")])
    assert listing(top(overlay, layer)) == ["d", "d/f"]
    assert OPAQUE not in os.listxattr(top(overlay, layer) / "d")


def test_implied_directories_look_as_in_the_parent(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    tmp = directory("var/tmp", 0o1777, uid=5, gid=6, mtime=777, pax_headers=xattrs(user__a=b"1"))
    layer = stack(
        [directory("./", 0o711, uid=9), directory("var", 0o750), tmp],
        [file("unrelated")],
        [file("var/tmp/x"), file("new/y")],
    )
    path = top(overlay, layer)
    status = os.stat(path / "var/tmp")
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime) == (0o1777, 5, 6, 777)
    assert os.getxattr(path / "var/tmp", "user.a") == b"1"
    assert stat.S_IMODE(os.stat(path / "var").st_mode) == 0o750
    assert (stat.S_IMODE(os.stat(path).st_mode), os.stat(path).st_uid) == (0o711, 9)
    assert stat.S_IMODE(os.stat(path / "new").st_mode) == 0o755
    with mounted(overlay.prepare("c", layer.chain_id), tmp_path / "m") as root:
        assert (stat.S_IMODE(root.stat().st_mode), root.stat().st_uid) == (0o711, 9)


def test_implied_directories_below_an_opaque_one_are_new(overlay: Overlay, stack: Stack) -> None:
    layer = stack([directory("a"), directory("a/b", 0o700, uid=5)], [directory("a"), opaque("a"), file("a/b/x")])
    status = os.stat(top(overlay, layer) / "a/b")
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o755, 0)


def test_directories_that_are_links_below_are_followed(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    base = [
        directory("usr/bin", 0o751),
        file("usr/bin/sh"),
        symlink("bin", "usr/bin"),
        symlink("lib64", "/lib"),
        symlink("lib", "usr/lib/../lib"),
        file("usr/bin/old"),
    ]
    layer = stack(
        base, [file("bin/tool", b"t"), whiteout("bin/old"), file("lib64/x", b"x"), hardlink("bin/tool2", "bin/tool")]
    )
    with mounted(overlay.prepare("c", layer.chain_id), tmp_path / "m") as root:
        assert os.readlink(root / "bin") == "usr/bin"
        assert listing(root / "usr") == ["bin", "bin/sh", "bin/tool", "bin/tool2", "lib", "lib/x"]
        assert (root / "usr/bin/tool2").samefile(root / "bin/tool")
        assert stat.S_IMODE((root / "usr/bin").stat().st_mode) == 0o751


def test_links_below_that_the_layer_removed_are_not_followed(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    layer = stack([directory("usr", 0o711), symlink("l", "usr")], [whiteout("l"), file("l/x")])
    with mounted(overlay.prepare("c", layer.chain_id), tmp_path / "m") as root:
        assert listing(root) == ["l", "l/x", "usr"]
        assert stat.S_IMODE((root / "l").stat().st_mode) == 0o755


def test_an_explicit_directory_replaces_a_link_below(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    layer = stack([directory("usr"), symlink("bin", "usr")], [directory("bin"), file("bin/x")])
    with mounted(overlay.prepare("c", layer.chain_id), tmp_path / "m") as root:
        assert not (root / "bin").is_symlink()
        assert listing(root) == ["bin", "bin/x", "usr"]


def test_looping_links_below_are_an_unpack_error(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    base = stack([symlink("a", "b"), symlink("b", "a")])
    with pytest.raises(UnpackError, match="too many links"):
        stack([file("a/x")], parent=base)


def test_hard_links_into_lower_layers_become_copies(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    base = [
        directory("d", mtime=5),
        file("d/f", b"lower" * 5000, 0o4711, uid=3, mtime=99, pax_headers=xattrs(user__a=b"1")),
        symlink("d/s", "f"),
        device("d/n", 1, 3),
        symlink("dd", "d"),
    ]
    layer = stack(
        base,
        [file("between")],
        [
            directory("e", mtime=7),
            hardlink("e/one", "d/f"),
            hardlink("e/two", "e/one"),
            hardlink("e/soft", "d/s"),
            hardlink("e/node", "/d/n"),
            hardlink("e/through", "dd/f"),
            hardlink("e/lost", "d/f"),
            file("e/lost", b"replaced"),
            hardlink("gone/x", "d/f"),
            file("gone", b"a file now"),
        ],
    )
    path = top(overlay, layer) / "e"
    one = os.stat(path / "one")
    assert (path / "one").read_bytes() == b"lower" * 5000
    assert (stat.S_IMODE(one.st_mode), one.st_uid, one.st_mtime, one.st_nlink) == (0o4711, 3, 99, 2)
    assert (path / "two").samefile(path / "one")
    assert os.listxattr(path / "one") == ["user.a"]
    assert os.readlink(path / "soft") == "f"
    assert os.lstat(path / "node").st_rdev == os.makedev(1, 3)
    assert (path / "through").read_bytes() == b"lower" * 5000
    assert (path / "lost").read_bytes() == b"replaced"
    assert path.stat().st_mtime == 7
    assert (path.parent / "gone").read_bytes() == b"a file now"


def test_hard_link_to_what_was_removed_is_refused(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    base = stack([directory("d"), file("d/f"), file("g")])
    for members in ([whiteout("g"), hardlink("h", "g")], [opaque("d"), hardlink("h", "d/f")], [hardlink("h", "d")]):
        with pytest.raises(UnpackError, match="hard link"):
            stack(members, parent=base)


def test_links_of_the_same_layer_are_followed_within_it(overlay: Overlay, stack: Stack) -> None:
    layer = stack([symlink("l", "/real/sub"), file("l/x", b"1"), symlink("up", "../../.."), file("up/y", b"2")])
    assert listing(top(overlay, layer)) == ["l", "real", "real/sub", "real/sub/x", "up", "y"]


def test_usage_is_what_the_layer_takes(overlay: Overlay, stack: Stack, tmp_path: Path) -> None:
    """As du(1) counts it: large directories, attributes beyond an inode, links into lower layers that became copies."""
    below = [
        directory("d"),
        file("d/a", b"x" * 5000),
        file("d/b", b"x" * 100),
        hardlink("d/c", "d/a"),
        symlink("s", "d"),
    ]
    many = [
        file("x", b"1", pax_headers=xattrs(user__long=b"v" * 3000)),
        *(file(f"many/{'n' * 200}{n}") for n in range(300)),
    ]
    stack(below, [hardlink("link", "d/a"), symlink("long", "t" * 200), file("again", b"1"), file("again", b"2" * 9000)])
    first = overlay.layers_usage()
    layers = str(tmp_path / "root/layers")

    def du(option: str) -> int:
        told = subprocess.run(["du", "-s", option, layers], capture_output=True, text=True, check=True).stdout
        return int(told.split()[0])

    assert (first.bytes, first.inodes) == (du("--block-size=1"), du("--inodes"))
    stack(many)
    usage = overlay.layers_usage()
    assert usage.bytes > first.bytes
    assert (usage.bytes, usage.inodes) == (du("--block-size=1"), du("--inodes"))
    assert sum(overlay.layer_sizes().values()) == usage.bytes - os.lstat(layers).st_blocks * 512


@pytest.mark.parametrize(
    "members",
    [
        [file("f", b"1"), file("f", b"2")],
        [directory("e"), file("e/f"), file("e/g"), file("e")],
        [file("f"), hardlink("g", "f"), file("f", b"2")],
        [symlink("l", "a"), symlink("l", "b"), fifo("p"), fifo("p")],
        [hardlink("x", "s"), hardlink("y", "x")],
        [hardlink("x", "d/a"), hardlink("y", "x"), file("x", b"1")],
    ],
)
def test_what_replaces_something_is_no_damage(overlay: Overlay, stack: Stack, members: list[Member]) -> None:
    stack([directory("d"), file("d/a", b"x"), symlink("s", "d")], members)
    assert overlay.damaged_layers() == []


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    needs("root", "overlay")
    small = FsMount("tmpfs", "small", (("size", "2m"), ("mode", "700")))
    with mounted(small, tmp_path / "small") as place:
        overlay = open_overlay(place, workers=1)
        (place / "blobs").mkdir()
        layer = blob(tmp_path, [file("big", os.urandom(4 << 20))])
        with pytest.raises(OSError, match="ENOSPC") as caught:
            overlay.unpack_layer(*layer.arguments())
        assert caught.value.errno == errno.ENOSPC
        assert leftovers(overlay, place) == []
        fitting = blob(tmp_path, [file("small", b"x" * 1000)])
        overlay.unpack_layer(*fitting.arguments())
        overlay.close()
        overlay._records._db.close()
