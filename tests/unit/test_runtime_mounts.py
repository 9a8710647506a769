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
