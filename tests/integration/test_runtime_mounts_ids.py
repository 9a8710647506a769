"""Mounts with ids of their own, and tmpcopyup out of hostile trees: whose files they are, inside and on the host."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.linux.mount import mount, umount2
from tests.bundles import Bundle, Bundles, bundles
from tests.costs import soon
from tests.fakes import fuse
from tests.hostile import swapping
from tests.integration.test_runtime_mounts import host_mounts, points
from tests.support import needs

KERNEL = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    before, fds = host_mounts(), len(os.listdir("/proc/self/fd"))
    with bundles(tmp_path) as opened:
        yield opened
    assert host_mounts() == before and len(os.listdir("/proc/self/fd")) == fds


def ids(*ranges: tuple[int, int, int]) -> dict[str, list[dict[str, int]]]:
    """uidMappings and gidMappings of an entry, the same for both."""
    lines = [{"containerID": inside, "hostID": host, "size": size} for inside, host, size in ranges]
    return {"uidMappings": lines, "gidMappings": lines}


def volume(home: Bundles, *owners: int) -> Path:
    """A directory with a file `fN` of each owner N."""
    source = home.directory / "volume"
    source.mkdir(exist_ok=True)
    for owner in owners:
        (source / f"f{owner}").touch()
        os.chown(source / f"f{owner}", owner, owner + 1)
    return source


def mapped(one: Bundle, source: Path, *options: str, **fields: Any) -> Bundle:
    one.mount("/m", "bind", source, *options)
    one.config["mounts"][-1].update(fields)
    return one


STAT = "stat -c '%n %u:%g' /m/*"


def test_ids_are_mapped_in_ranges_and_the_rest_is_nobodys(home: Bundles) -> None:
    one = home.sh(STAT)
    mapped(one, volume(home, 0, 1000, 1005, 5000), "bind", "idmap", **ids((0, 100_000, 1), (1000, 2000, 10)))
    assert one.run().ok().splitlines() == [
        "/m/f0 100000:65534",
        "/m/f1000 2000:2001",
        "/m/f1005 2005:2006",
        "/m/f5000 65534:65534",
    ]


def test_mappings_alone_ask_for_it(home: Bundles) -> None:
    one = mapped(home.sh(STAT), volume(home, 7), "rbind", "ro", **ids((7, 70, 2)))
    assert one.run().ok() == "/m/f7 70:71\n"


def test_without_mappings_those_of_the_container_count(home: Bundles) -> None:
    one = mapped(home.sh(f"{STAT}; touch /m/new"), volume(home, 0, 1000), "bind", "idmap").user_namespace()
    assert one.run().ok().splitlines() == ["/m/f0 0:1", "/m/f1000 1000:1001"]
    made = (home.directory / "volume/new").stat()
    assert (made.st_uid, made.st_gid) == (0, 0)


def test_without_mappings_those_of_a_joined_user_namespace_count(home: Bundles) -> None:
    first = home.make().user_namespace(host=300_000).up()
    two = home.sh(STAT)
    two.user_namespace(host=300_000)
    two.linux["namespaces"][-1]["path"] = f"/proc/{first.pid()}/ns/user"
    for key in ("uidMappings", "gidMappings"):
        two.linux.pop(key)
    two.linux["namespaces"] = [item for item in two.linux["namespaces"] if item["type"] in ("mount", "pid", "user")]
    mapped(two, volume(home, 0, 5), "bind", "idmap")
    assert two.run().ok().splitlines() == ["/m/f0 0:1", "/m/f5 5:6"]


@pytest.mark.parametrize(("option", "below"), [("idmap", "0:0"), ("ridmap", "50:50")])
def test_idmap_is_for_one_mount_and_ridmap_for_all(home: Bundles, option: str, below: str) -> None:
    source = volume(home, 0)
    (source / "sub").mkdir()
    mount("tmpfs", str(source / "sub"), "tmpfs", 0)
    try:
        (source / "sub/file").touch()
        one = mapped(home.sh("stat -c %u:%g /m/f0 /m/sub/file"), source, "rbind", option, **ids((0, 50, 5)))
        assert one.run().ok().split() == ["50:51", below]
    finally:
        umount2(str(source / "sub"))


def test_the_host_sees_nothing_of_a_mapping(home: Bundles) -> None:
    source = volume(home, 0)
    before = host_mounts()
    one = mapped(home.sh("touch /m/x; sleep 1000"), source, "bind", "idmap", **ids((0, 0, 1), (9, 50, 1)))
    one.up()
    assert "idmapped" in points(one)["/m"].options.split(",") and host_mounts() == before
    assert (source / "f0").stat().st_uid == 0
    one.delete().ok()


def test_o39_a_filesystem_that_maps_no_ids_says_so_and_leaves_nothing(home: Bundles) -> None:
    before = host_mounts()
    one = mapped(home.make("true"), Path("/proc/tty"), "bind", "idmap", **ids((0, 50, 5)))
    said = one.run().failed("failed to set MOUNT_ATTR_IDMAP on /proc/tty")
    assert "EINVAL" in said and "may not support id-mapped mounts" in said
    one.config["mounts"][-1]["source"] = "/no/such"
    one.run().failed("bind /no/such on /m (idmap)")
    one.config["mounts"][-1].update(source=str(volume(home)), **ids((0, 0, 1)))
    one.mount("/proc/self", "bind", "/tmp", "bind")  # fails once the mapped one is in place
    one.run().failed("cannot be mounted because")
    one.gone()
    assert host_mounts() == before


def test_ids_of_a_fuse_filesystem_are_mapped_where_its_server_says_so(home: Bundles) -> None:
    """Linux 6.12 has it; before, and without the server's word, it is refused by its name."""
    place = home.directory / "fuse"
    place.mkdir()
    for says_so in (True, False):
        with fuse.mounted(place, 1000, 1001, maps_ids=says_so):
            one = mapped(home.sh(f"stat -c %u:%g /m/{fuse.FILE}"), place, "bind", "idmap").user_namespace()
            if says_so and KERNEL >= (6, 12):
                assert one.run().ok() == "1000:1001\n"
            else:
                said = one.run().failed(f"failed to set MOUNT_ATTR_IDMAP on {place}")
                assert "EINVAL" in said and "may not support id-mapped mounts" in said
        one.gone()


def test_id_mapped_mounts_that_make_no_sense(home: Bundles) -> None:
    one = mapped(home.make("true"), volume(home), "bind", "idmap")
    one.run().failed("mounts[3].options: id-mapped mounts must have both uid and gid mappings specified")
    one.config["mounts"][-1].update(type="tmpfs", options=[], **ids((0, 0, 1)))
    one.run().failed("id-mapped mounts are only supported for bind-mounts")
    one.config["mounts"][-1].update(type="bind", options=["bind"], gidMappings=[])
    one.run().failed("mounts[3].gidMappings: id-mapped mounts must have both")


# --------------------------------------------------------------------------------------------------------- tmpcopyup


def copied(one: Bundle, *options: str) -> Bundle:
    (one.rootfs / "up").mkdir(exist_ok=True)
    return one.mount("/up", "tmpfs", "tmpfs", "tmpcopyup", *options)


def test_tmpcopyup_brings_everything_with_it(home: Bundles) -> None:
    one = copied(home.sh("cd /up; find . | sort | xargs stat -c '%n %F %a %u:%g %Y %s'; cat a/file; readlink link"))
    (one.rootfs / "bin/xargs").symlink_to("busybox")
    (one.rootfs / "bin/find").symlink_to("busybox")
    up = one.rootfs / "up"
    up.chmod(0o2751)
    os.chown(up, 12, 13)
    (up / "a").mkdir()
    (up / "a/file").write_text("content\n")
    (up / "link").symlink_to("/no/where")
    os.lchown(up / "link", 0, 0)
    os.mkfifo(up / "fifo")
    os.mknod(up / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for name, mode in (("a/file", 0o4640), ("fifo", 0o622), ("null", 0o601), ("a", 0o1700)):
        os.chown(up / name, 5, 6)
        (up / name).chmod(mode)
    for name in ("a/file", "link", "fifo", "null", "a", "."):
        os.utime(up / name, (1, 1_000_000_000), follow_symlinks=False)
    lines = one.run().ok().splitlines()
    assert [line.partition(" ")[2] for line in lines[:-2] if line.split()[0] != "."] == [
        "directory 1700 5:6 1000000000 60",
        "regular file 4640 5:6 1000000000 8",
        "fifo 622 5:6 1000000000 0",
        "symbolic link 777 0:0 1000000000 9",
        "character special file 601 5:6 1000000000 0",
    ]
    assert lines[0].startswith(". directory 2751 12:13 1000000000")
    assert lines[-2:] == ["content", "/no/where"]


def test_tmpcopyup_writes_stay_in_memory_and_options_count(home: Bundles) -> None:
    one = copied(home.sh("echo new > /up/f; stat -c %a:%u /up; grep ' /up ' /proc/self/mountinfo"), "mode=711", "uid=9")
    (one.rootfs / "up").mkdir(exist_ok=True)
    (one.rootfs / "up/f").write_text("old")
    said = one.run().ok()
    assert said.startswith("711:9\n") and (one.rootfs / "up/f").read_text() == "old"
    two = copied(home.sh("cat /up/f; touch /up/x"), "ro")
    (two.rootfs / "up/f").write_text("kept")
    result = two.run()
    assert result.text == "kept" and "Read-only" in result.error


def test_tmpcopyup_in_a_user_namespace(home: Bundles) -> None:
    one = home.sh("stat -c %u:%g /up /up/f; cat /up/f")
    copied(one)
    (one.rootfs / "up/f").write_text("mine\n")
    one.user_namespace()
    os.chown(one.rootfs / "up/f", 100_007, 100_008)
    assert one.run().ok().split() == ["0:0", "7:8", "mine"]


def test_tmpcopyup_of_nothing_and_of_another_kind_of_mount(home: Bundles) -> None:
    one = home.sh("ls -A /new").mount("/new", "tmpfs", "t", "tmpcopyup")
    assert one.run().ok() == ""
    (home.directory / "empty").mkdir()
    two = home.sh("ls /etc").mount("/etc", "bind", home.directory / "empty", "bind", "tmpcopyup")
    assert two.run().ok() == ""  # as in the peers: it means something for a tmpfs only


def test_s39_tmpcopyup_of_a_hostile_tree_stays_where_it_is(home: Bundles) -> None:
    secret = home.directory / "secret"
    secret.mkdir()
    (secret / "file").write_text("of the host")
    (secret / "pipe").mkdir()
    one = home.sh("cat /up/*/file /up/file /up/hard /up/abs/file; ls -R /up | wc -l; echo end")
    up = one.rootfs / "up"
    up.mkdir()
    (up / "abs").symlink_to(secret)
    (up / "rel").symlink_to(f"../../../../../../../../../..{secret}")
    (up / "file").symlink_to(secret / "file")
    (up / "exe").symlink_to("/proc/self/exe")
    (up / "loop").symlink_to("loop")
    os.mkfifo(up / "fifo")  # nobody writes: whoever opens it to read waits
    os.mknod(up / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with open(up / "sparse", "wb") as file:
        file.truncate(1 << 40)
    copied(one, "size=1m")
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in secret.rglob("*"))
    with soon():  # neither waits for a writer nor reads a terabyte
        result = one.run()
    assert result.text.endswith("end\n") and "of the host" not in result.text
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in secret.rglob("*")) == before


def test_s39_tmpcopyup_is_bounded_by_its_size_and_by_path_max(home: Bundles) -> None:
    one = copied(home.make("true"), "size=64k")
    (one.rootfs / "up/big").write_bytes(b"x" * (1 << 20))
    one.run().failed("tmpcopyup: failed to copy /: ENOSPC no space left on device")
    (one.rootfs / "up/big").unlink()
    fd = os.open(one.rootfs / "up", os.O_RDONLY)
    for _ in range(30):  # deeper than a path can say
        os.mkdir("d" * 200, dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    one.config["mounts"][-1]["options"] = ["tmpcopyup"]
    one.run().failed("ENAMETOOLONG")
    one.gone()
    subprocess.run(["rm", "-rf", str(one.rootfs / "up")], check=True)


def test_s39_tmpcopyup_enters_no_mount_that_lies_below(home: Bundles) -> None:
    other = home.directory / "other"
    other.mkdir()
    (other / "big").write_bytes(b"x" * (1 << 20))
    one = home.sh("ls -A /up /up/vol")
    (one.rootfs / "up/vol").mkdir(parents=True)
    (one.rootfs / "up/own").touch()
    one.mount("/up/vol", "bind", other, "bind")
    copied(one, "size=64k")
    assert one.run().ok().split() == ["/up:", "own", "vol", "/up/vol:"]


def test_s40_tmpcopyup_while_a_neighbour_swaps_links(home: Bundles) -> None:
    secret = home.directory / "secret"
    (secret / "deep").mkdir(parents=True)
    (secret / "deep/file").write_text("of the host")
    shared = home.directory / "shared"
    (shared / "up/one/deep").mkdir(parents=True)
    (shared / "up/one/deep/file").write_text("own")
    (shared / "up/two").symlink_to(secret)
    one = home.sh("cat /vol/up/one/deep/file /vol/up/two/deep/file")
    one.mount("/vol", "bind", shared, "rbind").mount("/vol/up", "tmpfs", "t", "tmpcopyup", "size=1m")
    with swapping(shared / "up", "one", "two"):
        for _ in range(20):
            assert "of the host" not in one.run().text
            one.gone()
    assert (secret / "deep/file").read_text() == "of the host"
