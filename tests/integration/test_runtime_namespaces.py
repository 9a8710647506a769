"""Namespaces as the kernel sees them: new ones and joined ones, what a user namespace maps, what a clock says."""

from __future__ import annotations

import fcntl
import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import Bundle, Bundles, bundles
from tests.support import eventually, needs

NS_GET_USERNS = 0xB701  # linux/nsfs.h
HOST = 100_000
KINDS = {"user": "user", "pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup", "mount": "mnt"}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def ns(pid: int | str, name: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


def owner_of(pid: int, name: str) -> int:
    """The inode of the user namespace that a namespace of `pid` belongs to."""
    fd = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY)
    try:
        owner = fcntl.ioctl(fd, NS_GET_USERNS)
        try:
            return os.fstat(owner).st_ino
        finally:
            os.close(owner)
    finally:
        os.close(fd)


def status(text: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def mappings(*entries: tuple[int, int, int]) -> list[dict[str, int]]:
    return [{"containerID": inside, "hostID": outside, "size": size} for inside, outside, size in entries]


def add(one: Bundle, kind: str, path: str = "") -> Bundle:
    """Takes the namespace of that kind into the config, in place of what is there."""
    kept = [entry for entry in one.linux["namespaces"] if entry["type"] != kind]
    one.linux["namespaces"] = [*kept, {"type": kind, **({"path": path} if path else {})}]
    return one


@contextmanager
def held(*flags: str) -> Iterator[int]:
    """A process of the host in new namespaces (unshare(1) flags), there to be joined."""
    child = subprocess.Popen(["unshare", *flags, "--", "sleep", "1000"])
    try:
        # It has done so when it executes the other command.
        eventually(lambda: os.readlink(f"/proc/{child.pid}/exe").endswith("sleep"), what="unshare")
        yield child.pid
    finally:
        child.kill()
        child.wait()


# ------------------------------------------------------------------------------------------------------------- time


def uptime(text: str) -> float:
    return float(text.split()[0])


@pytest.mark.parametrize("user", [False, True])
def test_a_time_namespace_has_its_offsets(home: Bundles, user: bool) -> None:
    one = add(home.make(), "time")
    if user:
        one.user_namespace()
    one.linux["timeOffsets"] = {"monotonic": {"secs": 172_800}, "boottime": {"secs": 604_800, "nanosecs": 7}}
    one.up()
    pid = one.pid()
    assert ns(pid, "time") == ns(pid, "time_for_children") != ns("self", "time")
    offsets = [line.split() for line in Path(f"/proc/{pid}/timens_offsets").read_text().splitlines()]
    assert offsets == [["monotonic", "172800", "0"], ["boottime", "604800", "7"]]
    assert owner_of(pid, "time") == os.stat(f"/proc/{pid}/ns/user").st_ino
    ahead = uptime(one.exec("cat", "/proc/uptime").ok()) - uptime(Path("/proc/uptime").read_text())
    assert 604_800 <= ahead + 1 < 604_830, ahead
    assert one.exec("readlink", "/proc/self/ns/time").ok().strip() == ns(pid, "time")


def test_a_time_namespace_without_offsets_and_one_that_is_joined(home: Bundles) -> None:
    first = add(home.make(), "time")
    first.linux["timeOffsets"] = {"boottime": {"secs": 5000}}
    first.up()
    second = add(home.make(), "time", f"/proc/{first.pid()}/ns/time").up()
    assert ns(second.pid(), "time") == ns(first.pid(), "time")
    assert uptime(second.exec("cat", "/proc/uptime").ok()) > uptime(Path("/proc/uptime").read_text()) + 4900
    third = add(home.make(), "time").up()
    assert ns(third.pid(), "time") not in (ns("self", "time"), ns(first.pid(), "time"))
    assert abs(uptime(third.exec("cat", "/proc/uptime").ok()) - uptime(Path("/proc/uptime").read_text())) < 30


@pytest.mark.parametrize(
    ("kind", "offsets", "words"),
    [
        ("", {"boottime": {"secs": 1}}, "linux.timeOffsets: time namespace offsets specified"),
        ("path", {"boottime": {"secs": 1}}, "linux.timeOffsets: both namespace path and time offsets"),
        ("new", {"realtime": {"secs": 1}}, "linux.timeOffsets.realtime: there is no such clock"),
        ("new", {"boottime": {"secs": "1"}}, "linux.timeOffsets.boottime.secs: expected"),
        ("new", {"boottime": {"secs": 1, "nanosecs": 10**9}}, "linux.timeOffsets.boottime.nanosecs: expected"),
        # Before the machine was started: the kernel allows no negative clock.
        ("new", {"boottime": {"secs": -(10**10)}}, "linux.timeOffsets: set boottime -10000000000 0: ERANGE"),
    ],
)
def test_offsets_that_cannot_be_are_refused(home: Bundles, kind: str, offsets: dict[str, Any], words: str) -> None:
    one = home.make("true")
    if kind:
        add(one, "time", "/proc/self/ns/time" if kind == "path" else "")
    one.linux["timeOffsets"] = offsets
    one.run().failed(words)
    one.gone()


# ------------------------------------------------------------------------------------------------------------- user


def test_every_mapping_is_written_as_it_is_given(home: Bundles) -> None:
    one = home.sh("cat /proc/self/uid_map /proc/self/gid_map; stat -c %u:%g /mine; id").user_namespace()
    one.linux["uidMappings"] = mappings((0, HOST, 10), (10, 300_000, 5), (1000, 1000, 1))
    one.linux["gidMappings"] = mappings((0, HOST, 1), (5, 400_000, 2))
    mine = one.rootfs / "mine"
    mine.touch()
    os.chown(mine, 300_004, 400_001)
    one.process["user"] = {"uid": 1000, "gid": 6, "additionalGids": [0, 5]}
    lines = [line.split() for line in one.run().ok().splitlines()]
    assert lines[:3] == [["0", "100000", "10"], ["10", "300000", "5"], ["1000", "1000", "1"]]
    assert lines[3:5] == [["0", "100000", "1"], ["5", "400000", "2"]]
    assert lines[5] == ["14:6"] and lines[6] == ["uid=1000(user)", "gid=6", "groups=0,5"]


def test_as_many_mappings_as_the_kernel_takes(home: Bundles) -> None:
    one = home.make("cat", "/proc/self/uid_map").user_namespace(host=1000)
    one.linux["uidMappings"] = mappings(*((n, 1000 + n, 1) for n in range(340)))
    lines = one.run().ok().splitlines()
    assert [tuple(map(int, line.split())) for line in lines] == [(n, 1000 + n, 1) for n in range(340)]


@pytest.mark.parametrize(
    ("uids", "gids", "words"),
    [
        ([], [(0, 1, 1)], "linux.uidMappings: user namespaces enabled, but no uid mappings found"),
        ([(0, 1, 1)], [], "linux.gidMappings: user namespaces enabled, but no gid mappings found"),
        ([(1, 1, 1)], [(0, 1, 1)], "linux.uidMappings: user namespaces enabled, but no mapping found for uid 0"),
        ([(0, 1, 1)], [(5, 1, 1)], "linux.gidMappings: user namespaces enabled, but no mapping found for gid 0"),
        ([(0, 1, 9), (8, 50, 1)], [(0, 1, 1)], "linux.uidMappings[1]: has container ids that are in uidMappings[0]"),
        ([(20, 5, 9), (0, 1, 9)], [(0, 1, 1)], "linux.uidMappings[0]: has host ids that are in uidMappings[1]"),
        ([(0, 2**32 - 2, 2)], [(0, 1, 1)], "linux.uidMappings[0]: goes beyond the largest id"),
        ([(0, 1, 0)], [(0, 1, 1)], "linux.uidMappings[0].size: expected"),
        ([(n, 1 + n, 1) for n in range(341)], [(0, 1, 1)], "linux.uidMappings: 341 mappings, the kernel takes"),
        ([(n, HOST + n, 1) for n in range(340)], [(0, 1, 1)], "bytes of mappings, the kernel takes less than 4096"),
    ],
)
def test_s18_mappings_that_cannot_be_are_refused(
    home: Bundles, uids: list[tuple[int, int, int]], gids: list[tuple[int, int, int]], words: str
) -> None:
    one = home.make("true").user_namespace()
    one.linux["uidMappings"], one.linux["gidMappings"] = mappings(*uids), mappings(*gids)
    one.run().failed(words)
    one.gone()


def test_mappings_without_a_user_namespace_are_refused(home: Bundles) -> None:
    one = home.make("true")
    one.linux["gidMappings"] = mappings((0, HOST, 1))
    one.run().failed("linux.gidMappings: user namespace mappings specified, but user namespace isn't enabled")


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"uid": 50, "gid": 0}, "cannot set uid to unmapped user in user namespace: uid 50"),
        ({"uid": 0, "gid": 50}, "cannot set gid to unmapped user in user namespace: gid 50"),
        ({"uid": 0, "gid": 0, "additionalGids": [3, 50]}, "set additional groups 3, 50: EINVAL"),
    ],
)
def test_ids_that_the_namespace_lacks_are_refused(home: Bundles, user: dict[str, Any], words: str) -> None:
    one = home.make().user_namespace(size=10)
    good, one.process["user"] = one.process["user"], user
    one.run().failed(words)
    one.gone()
    one.process["user"] = good
    one.up()
    if "additionalGids" not in user:
        one.exec("true", flags=("--user", f"{user['uid']}:{user['gid']}")).failed(words)
    assert one.exec("id", "-u").ok() == "0\n"


def test_a_joined_user_namespace_may_be_described_only_as_it_is(home: Bundles) -> None:
    first = home.make().user_namespace().up()
    second = home.make().user_namespace()
    add(second, "user", f"/proc/{first.pid()}/ns/user")
    second.up()
    assert ns(second.pid(), "user") == ns(first.pid(), "user")
    third = home.make("true").user_namespace()
    add(third, "user", f"/proc/{first.pid()}/ns/user")
    third.linux["gidMappings"] = mappings((0, HOST, 1000))
    third.run().failed("linux.gidMappings: user namespaces enabled, but both namespace path and mapping specified")
    third.gone()


def test_the_root_and_the_sources_are_reached_with_the_callers_rights(home: Bundles) -> None:
    """Directories of 0700 on the way to them do not matter, whether the user namespace is new or joined."""
    hidden = home.directory / "hidden"
    (hidden / "source").mkdir(parents=True)
    (hidden / "source/file").write_text("found")
    first = home.make().user_namespace()
    first.mount("/data", "bind", hidden / "source", "rbind", "ro")
    second = home.make().user_namespace()
    second.mount("/data", "bind", hidden / "source", "rbind", "ro")
    for one in (first, second):
        one.path.chmod(0o700)
    hidden.chmod(0o700)
    first.up()
    add(second, "user", f"/proc/{first.pid()}/ns/user")
    second.up()
    for one in (first, second):
        assert one.exec("cat", "/data/file").ok() == "found"


@pytest.mark.parametrize("joined", [False, True])
def test_namespaces_of_the_hosts_are_joined_with_a_user_namespace(home: Bundles, joined: bool) -> None:
    first = home.make().user_namespace().up()
    with held("--net", "--uts", "--ipc", "--cgroup") as pid:
        one = home.make().user_namespace()
        for kind in ("network", "uts", "ipc", "cgroup"):
            add(one, kind, f"/proc/{pid}/ns/{KINDS[kind]}")
        if joined:
            add(one, "user", f"/proc/{first.pid()}/ns/user")
        one.up()
        assert owner_of(pid, "net") != os.stat(f"/proc/{one.pid()}/ns/user").st_ino
        for name in ("net", "uts", "ipc", "cgroup"):
            assert ns(one.pid(), name) == ns(pid, name) != ns("self", name)
            assert one.exec("readlink", f"/proc/self/ns/{name}").ok().strip() == ns(pid, name)
        assert (ns(one.pid(), "user") == ns(first.pid(), "user")) is joined
        one.delete().ok()


def test_namespaces_of_another_containers_user_namespace_are_joined(home: Bundles) -> None:
    first = add(home.make().user_namespace(), "time").up()
    second = home.make().user_namespace()
    for kind, name in {**KINDS, "time": "time"}.items():
        if kind != "mount":
            add(second, kind, f"/proc/{first.pid()}/ns/{name}")
    second.up()
    for name in ("user", "pid", "net", "ipc", "uts", "time", "cgroup"):
        assert ns(second.pid(), name) == ns(first.pid(), name), name
        assert second.exec("readlink", f"/proc/self/ns/{name}").ok().strip() == ns(first.pid(), name)
    assert ns(second.pid(), "mnt") != ns(first.pid(), "mnt")


def test_the_order_in_the_config_means_nothing(home: Bundles) -> None:
    kinds = [*KINDS, "time"]
    for order in itertools.islice(itertools.permutations(kinds), 0, 40_320, 6000):
        one = home.sh("cat /proc/self/uid_map; for n in /proc/self/ns/*; do readlink $n; done").user_namespace()
        one.linux["namespaces"] = [{"type": kind} for kind in order]
        words = one.run().ok().split()
        assert words[:3] == ["0", str(HOST), "65536"], order
        assert not set(words[3:]) & {ns("self", name) for name in (*KINDS.values(), "time")}, order


def test_a_mount_namespace_is_not_joined(home: Bundles) -> None:
    """runc 1.1 goes in and pivots the root of everybody there, be it the host's."""
    first = home.make().up()
    for path in ("/proc/self/ns/mnt", f"/proc/{first.pid()}/ns/mnt"):
        one = add(home.make("true"), "mount", path)
        one.run().failed("linux.namespaces[5].path: a mount namespace cannot be joined")
        one.gone()


def test_sysctls_of_a_user_namespace_are_its_own(home: Bundles) -> None:
    held = Path("/proc/sys/user/max_net_namespaces")
    before = held.read_text()
    one = home.sh("cat /proc/sys/user/max_net_namespaces").user_namespace()
    one.linux["sysctl"] = {"user.max_net_namespaces": "7"}
    assert one.run().ok() == "7\n"
    refused = home.make("true")
    refused.linux["sysctl"] = {"user.max_net_namespaces": "7"}
    refused.run().failed("not allowed in host user namespace")
    assert held.read_text() == before


def test_s67_limits_hold_in_a_user_namespace(home: Bundles) -> None:
    one = home.make("sleep", "1000").user_namespace()
    one.linux["resources"] = {"pids": {"limit": 5}, "memory": {"limit": 32 << 20}}
    one.up()
    lines = Path(f"/proc/{one.pid()}/cgroup").read_text().splitlines()
    mine = f"/{home.cgroup}/{one.id}"
    places = {line.split(":")[1]: line.split(":")[2] for line in lines}
    limited = [places[name] for name in ("pids", "memory") if name in places] or [places[""]]
    assert all(place.endswith(mine) for place in limited), places
    # An exec is in there as well: six at once are more than five.
    said = one.exec("sh", "-c", "for i in 1 2 3 4 5 6; do sleep 1000 & done; wait").failed("fork", code=2)
    assert "Resource temporarily unavailable" in said
    hungry = home.make("dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1").user_namespace()
    hungry.linux["resources"] = {"memory": {"limit": 32 << 20, "swap": 32 << 20}}
    assert hungry.run().code == 137


def test_s05_no_inheritable_capabilities_in_a_user_namespace(home: Bundles) -> None:
    one = home.sh("cat /proc/self/status; sleep 1000").user_namespace()
    for name in ("bounding", "effective", "permitted"):
        one.process["capabilities"][name].append("CAP_NET_ADMIN")
    one.up()
    texts = [Path(f"/proc/{one.pid()}/status").read_text(), one.exec("cat", "/proc/self/status").ok()]
    texts.append(one.exec("cat", "/proc/self/status", flags=("--user", "5", "--cap", "CAP_KILL")).ok())
    for text in texts:
        found = status(text)
        assert int(found["CapInh"], 16) == int(found["CapAmb"], 16) == 0
    assert int(status(texts[0])["CapEff"], 16) >> 12 & 1


def test_s17_root_of_a_user_namespace_cannot_look_into_what_comes(home: Bundles) -> None:
    """/proc/PID of an init before execve, and of what joins, belongs to the host's root and not to the container's."""
    one = home.make().user_namespace()
    one.create().ok()
    assert os.stat(f"/proc/{one.pid()}/fd").st_uid == 0
    one.start().ok()
    for name in ("bounding", "effective", "permitted"):
        one.process["capabilities"][name].append("CAP_SYS_PTRACE")
    watcher = home.make("sh", "-c", WATCHER).user_namespace()
    watcher.process["capabilities"] = one.process["capabilities"]
    watcher.up()
    for _ in range(10):
        watcher.exec("true").ok()
    assert "SAW" not in (watcher.rootfs / "tmp/log").read_text()


# Looks at whatever appears, for fds or memory of anything that is not one of its own applets.
WATCHER = """
touch /tmp/log
while :; do
  for p in /proc/[0-9]*; do
    exe=$(readlink $p/exe) || continue
    case $exe in /bin/busybox) ;; *) echo "SAW $p $exe" >> /tmp/log;; esac
  done
done
"""


def test_the_hosts_oom_order_and_a_keyring_of_its_own(home: Bundles) -> None:
    one = home.make().user_namespace()
    one.process["oomScoreAdj"] = 777
    one.up()
    assert Path(f"/proc/{one.pid()}/oom_score_adj").read_text().strip() == "777"
    assert one.exec("cat", "/proc/self/oom_score_adj").ok().strip() == "777"
    # /proc/keys has what belongs to ids of the reader's user namespace: the keyring is the container's, not the host's.
    assert f"_ses.{one.id}" in one.exec("cat", "/proc/keys").ok()
    two = home.make("cat", "/proc/keys").user_namespace()
    assert f"_ses.{two.id}" in two.run().ok()
