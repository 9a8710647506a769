"""What mount entries mean before anything is mounted: sorted options, attributes of binds, data, plans."""

from __future__ import annotations

import pytest

from runtime import mounts
from runtime.fields import Fields
from runtime.linux.mount import (
    MOUNT_ATTR_ATIME,
    MOUNT_ATTR_NOATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
    MS_I_VERSION,
    MS_NOATIME,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RELATIME,
    MS_SHARED,
    MS_SLAVE,
    MS_SYNCHRONOUS,
    MS_UNBINDABLE,
)
from runtime.mounts import Attributes, own_attributes
from runtime.rootfs_cgroup import CgroupPlan, plan_cgroups
from runtime.rootfs_mounts import filesystem_options
from runtime.rootfs_remount import mount_flags

RO, NOSUID, NODEV, NOEXEC = MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC
FOUR = RO | NOSUID | NODEV | NOEXEC
ALL = FOUR | MOUNT_ATTR_NOSYMFOLLOW


def entry(*options: str, **fields: object) -> mounts.Mount:
    document = {"destination": "/d", "type": "tmpfs", "source": "s", "options": list(options), **fields}
    return mounts.parse(Fields(document, "mounts[0]"))


@pytest.mark.parametrize(
    ("options", "current", "locked", "wanted"),
    [
        (("bind",), FOUR, False, Attributes()),
        (("rbind", "rprivate", "rro"), FOUR, True, Attributes()),
        (("bind", "ro"), NOSUID, False, Attributes(RO, ALL & ~RO)),
        (("bind", "ro"), NOSUID, True, Attributes(RO, ALL & ~RO & ~NOSUID)),
        (("bind", "rw"), RO, False, Attributes(0, ALL)),
        (("bind", "rw"), RO, True, None),
        (("bind", "rw"), NOSUID, True, Attributes(0, ALL & ~NOSUID)),
        (("bind", "dev"), NOSUID | NODEV, True, None),
        (("bind", "silent"), NOSUID, False, Attributes(0, ALL)),
        (("bind", "symfollow"), FOUR, True, Attributes(0, MOUNT_ATTR_NOSYMFOLLOW)),
        (("bind", "noatime"), 0, False, Attributes(MOUNT_ATTR_NOATIME, ALL | MOUNT_ATTR_ATIME | MOUNT_ATTR_NODIRATIME)),
        (("bind", "nodiratime"), 0, False, Attributes(MOUNT_ATTR_NODIRATIME, ALL)),
        (("bind", "diratime"), 0, False, Attributes(0, ALL | MOUNT_ATTR_NODIRATIME)),
    ],
)
def test_attributes_of_a_bind(options: tuple[str, ...], current: int, locked: bool, wanted: Attributes | None) -> None:
    assert own_attributes(entry(*options), current, locked=locked) == wanted


def test_every_option_of_a_kind_undoes_its_opposite() -> None:
    for name, (set_, clear) in mounts.ATTRIBUTES.items():
        own = entry(name).attributes
        assert own.set & set_ == set_ and not own.set & clear & ~set_
        assert own.clear & MOUNT_ATTR_ATIME in (0, MOUNT_ATTR_ATIME), name  # mount_setattr(2) takes no part of it
        below = entry("rbind", f"r{name}").recursive_attributes
        assert below == own and entry("rbind", f"r{name}").attributes == Attributes()
    for on, off in (("sync", "async"), ("lazytime", "nolazytime"), ("mand", "nomand"), ("iversion", "noiversion")):
        assert entry(on).superblock and entry(on, off).superblock == 0 and entry(off, on) != entry(on, off)


@pytest.mark.parametrize(
    ("options", "data"),
    [
        (("size=1,mode=2", "x"), (("size", "1"), ("mode", "2"), ("x", None))),
        ((",", ""), ()),
        (('context="a:b:c1,c2",size=1',), (("context", '"a:b:c1,c2"'), ("size", "1"))),
        ((r"lowerdir=/a\,b:/c,volatile",), (("lowerdir", r"/a\,b:/c"), ("volatile", None))),
        (("a=b=c", "acl", "="), (("a", "b=c"), ("acl", None), ("", ""))),
    ],
)
def test_data_is_split_as_the_kernel_would(options: tuple[str, ...], data: tuple[tuple[str, str | None], ...]) -> None:
    assert entry(*options).data == data


def test_what_a_filesystem_is_told() -> None:
    found = entry("sync", "iversion", "silent", "size=1")
    assert found.superblock & (MS_SYNCHRONOUS | MS_I_VERSION) == MS_SYNCHRONOUS | MS_I_VERSION
    assert filesystem_options(found, "", 0o750) == (("mode", "750"), ("size", "1"), ("sync", None))
    assert filesystem_options(entry("mode=1"), "", 0o750) == (("mode", "1"),)
    assert filesystem_options(entry("ro", source="/dev/vdb", type="ext4"), "", None) == (("ro", None),)


def test_the_label_of_mounts() -> None:
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    assert filesystem_options(entry(), label, None) == (("context", label),)
    for kind in ("proc", "sysfs", "mqueue", "cgroup2"):
        assert filesystem_options(entry(type=kind), label, None) == ()


def test_flags_of_a_remount() -> None:
    found = entry("remount", "nosuid", "noatime", "sync")
    assert found.kind == "remount" and mount_flags(found) == MS_NOSUID | MS_NOATIME | MS_SYNCHRONOUS
    assert mount_flags(entry("remount")) == 0 and mount_flags(entry("remount", "relatime")) == MS_RELATIME
    assert entry("remount", "bind", "ro", source="").fstype == "bind"


def test_id_mappings_of_a_mount() -> None:
    ids = [{"containerID": 0, "hostID": 1000, "size": 1}]
    found = entry("rbind", "ridmap", uidMappings=ids, gidMappings=ids).idmap
    assert found is not None and found.recursive and found.uids == found.gids and found.uids[0].host == 1000
    plain = entry("bind", uidMappings=ids, gidMappings=ids).idmap
    assert plain is not None and not plain.recursive
    bare = entry("bind", "ridmap", "idmap").idmap
    assert bare is not None and not bare.recursive and bare.uids == ()
    assert entry("bind", uidMappings=[], gidMappings=[]).idmap is None


def test_describe_names_everything() -> None:
    found = entry("rbind", "rw", "nosuid", "rro", "rslave", "idmap", "sync", source="/s")
    assert found.describe() == "bind /s on /d (nosuid,rw,rro,sync,rslave,idmap)"
    assert entry("tmpcopyup", "size=1").describe() == "mount tmpfs s on /d (tmpcopyup,size=1)"
    assert entry("remount", "ro").describe() == "remount /d (ro)"


@pytest.mark.parametrize(
    ("value", "first"),
    [
        (None, (MS_SLAVE, True)),
        ((MS_PRIVATE, False), (MS_PRIVATE, False)),
        ((MS_SHARED, True), (MS_SHARED, True)),
        ((MS_UNBINDABLE, True), (MS_PRIVATE, True)),
    ],
)
def test_propagation_that_the_init_begins_with(value: tuple[int, bool] | None, first: tuple[int, bool]) -> None:
    assert mounts.init_propagation(value) == first


def test_the_list_of_options_is_complete() -> None:
    known = mounts.known_options()
    assert {"rro", "ridmap", "tmpcopyup", "remount", "rnosymfollow", "silent", "loud", "runbindable"} <= set(known)
    assert known == sorted(known)


# ------------------------------------------------------------------------------------------------------------- cgroups


def v1(**hierarchies: str) -> tuple[dict[str, str], dict[str, str]]:
    """(cgroups, mount points) of /c in hierarchies by the name of their directory: `cpu_cpuacct="cpu cpuacct"`."""
    cgroups, mount_points = {}, {}
    for name, controllers in hierarchies.items():
        top = "/sys/fs/cgroup/" + name.replace("_and_", ",")
        mount_points[f"{top}/c"] = top
        for controller in controllers.split():
            cgroups["" if controller == "v2" else controller] = f"{top}/c"
    return cgroups, mount_points


def test_merged_controllers_have_links() -> None:
    cgroups, mount_points = v1(
        cpu_and_cpuacct="cpu cpuacct", net_cls_and_net_prio="net_cls net_prio", memory="memory", systemd="name=systemd"
    )
    for own in (False, True):
        plan = plan_cgroups("cgroup", cgroups, mount_points, own=own)
        assert plan.own == "" and [name for name, _ in plan.directories] == [
            "cpu,cpuacct",
            "memory",
            "net_cls,net_prio",
            "systemd",
        ]
        assert dict(plan.directories)["cpu,cpuacct"] == "/sys/fs/cgroup/cpu,cpuacct/c"
        assert dict(plan.links) == {
            "cpu": "cpu,cpuacct",
            "cpuacct": "cpu,cpuacct",
            "net_cls": "net_cls,net_prio",
            "net_prio": "net_cls,net_prio",
        }


def test_a_controller_whose_directory_has_another_name_has_a_link() -> None:
    cgroups, mount_points = v1(frozen="freezer", cpu="cpu")
    assert plan_cgroups("cgroup", cgroups, mount_points, own=True).links == (("freezer", "frozen"),)


def test_one_of_two_merged_controllers_is_enough_for_both_links() -> None:
    cgroups, mount_points = v1(cpu_and_cpuacct="cpu")
    assert dict(plan_cgroups("cgroup", cgroups, mount_points, own=True).links).keys() == {"cpu", "cpuacct"}


def test_a_hybrid_shows_both_or_the_newer() -> None:
    cgroups, mount_points = v1(memory="memory", unified="v2")
    both = plan_cgroups("cgroup", cgroups, mount_points, own=True)
    assert [name for name, _ in both.directories] == ["memory", "unified"] and both.links == ()
    assert plan_cgroups("cgroup2", cgroups, mount_points, own=True) == CgroupPlan(own="/sys/fs/cgroup/unified/c")


def test_cgroup2_is_the_containers_own_or_all_of_it() -> None:
    cgroups, mount_points = {"": "/sys/fs/cgroup/a/c"}, {"/sys/fs/cgroup/a/c": "/sys/fs/cgroup"}
    for fstype in ("cgroup", "cgroup2"):
        assert plan_cgroups(fstype, cgroups, mount_points, own=True).own == "/sys/fs/cgroup/a/c"
        assert plan_cgroups(fstype, cgroups, mount_points, own=False).own == "/sys/fs/cgroup"
