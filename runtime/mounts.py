"""Mount entries of config.json: their options read into what the new mount API takes, pure and without a kernel.

Refuses an option that it does not know for a bind mount, and those whose meaning it would lose (idmap, remount,
tmpcopyup). Invariant: a bind mount starts with the restrictions of its source and `rw`, `suid`, `dev` or `exec` only
take back what the same list of options asked for before, so no option lifts what the host's mount forbids.
"""

from __future__ import annotations

from runtime.linux.mount import (
    MOUNT_ATTR_ATIME,
    MOUNT_ATTR_NOATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_RELATIME,
    MOUNT_ATTR_STRICTATIME,
    MS_PRIVATE,
    MS_SHARED,
    MS_SLAVE,
    MS_UNBINDABLE,
)
from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.fields import Fields

# option: (bits to set, bits to clear), as mount_setattr(2) takes them. Access times are one field, not bits.
ATTRIBUTES = {
    "ro": (MOUNT_ATTR_RDONLY, 0),
    "rw": (0, MOUNT_ATTR_RDONLY),
    "nosuid": (MOUNT_ATTR_NOSUID, 0),
    "suid": (0, MOUNT_ATTR_NOSUID),
    "nodev": (MOUNT_ATTR_NODEV, 0),
    "dev": (0, MOUNT_ATTR_NODEV),
    "noexec": (MOUNT_ATTR_NOEXEC, 0),
    "exec": (0, MOUNT_ATTR_NOEXEC),
    "nosymfollow": (MOUNT_ATTR_NOSYMFOLLOW, 0),
    "symfollow": (0, MOUNT_ATTR_NOSYMFOLLOW),
    "nodiratime": (MOUNT_ATTR_NODIRATIME, 0),
    "diratime": (0, MOUNT_ATTR_NODIRATIME),
    "noatime": (MOUNT_ATTR_NOATIME, MOUNT_ATTR_ATIME),
    "atime": (MOUNT_ATTR_RELATIME, MOUNT_ATTR_ATIME),
    "relatime": (MOUNT_ATTR_RELATIME, MOUNT_ATTR_ATIME),
    "norelatime": (MOUNT_ATTR_STRICTATIME, MOUNT_ATTR_ATIME),
    "strictatime": (MOUNT_ATTR_STRICTATIME, MOUNT_ATTR_ATIME),
    "nostrictatime": (MOUNT_ATTR_RELATIME, MOUNT_ATTR_ATIME),
}
PROPAGATION = {
    "private": (MS_PRIVATE, False),
    "rprivate": (MS_PRIVATE, True),
    "slave": (MS_SLAVE, False),
    "rslave": (MS_SLAVE, True),
    "shared": (MS_SHARED, False),
    "rshared": (MS_SHARED, True),
    "unbindable": (MS_UNBINDABLE, False),
    "runbindable": (MS_UNBINDABLE, True),
}
# Options of the filesystem itself that mount(2) knows as flags; fsconfig(2) takes them by name.
SUPERBLOCK = frozenset({"sync", "dirsync", "lazytime", "mand", "iversion"})
IGNORED = frozenset({"defaults", "async", "nolazytime", "nomand", "noiversion", "silent", "loud", "acl", "noacl"})
REFUSED = frozenset({"idmap", "ridmap", "remount", "tmpcopyup", "copy-symlink"})
PATH_MAX = 4096  # linux/limits.h


class Attributes(Record):
    """Bits for mount_setattr(2): what to set, and what to clear before."""

    set: int = 0
    clear: int = 0

    def plus(self, set_: int, clear: int) -> Attributes:
        """With one more option applied, the later winning."""
        return Attributes(self.set & ~clear | set_, self.clear | (clear & MOUNT_ATTR_ATIME))


class Mount(Record):
    """One entry of config.json's mounts, or a tmpfs that the runtime adds.

    `kind` is "bind", "cgroup" or "filesystem"; `attributes` are for this mount, `recursive_attributes` for all below
    it too; `data` goes to fsconfig(2). `path` is the entry's place in config.json, for errors.
    """

    destination: str
    kind: str
    fstype: str
    source: str = ""
    recursive: bool = False
    attributes: Attributes = Attributes()
    recursive_attributes: Attributes = Attributes()
    propagation: tuple[tuple[int, bool], ...] = ()
    data: tuple[tuple[str, str | None], ...] = ()
    path: str = ""

    @property
    def read_only(self) -> bool:
        return bool(self.attributes.set & MOUNT_ATTR_RDONLY)

    def describe(self) -> str:
        """As an error prints it: source, target and flags by name."""
        flags = [name for name, (set_, _) in ATTRIBUTES.items() if set_ and self.attributes.set & set_]
        flags += [key if value is None else f"{key}={value}" for key, value in self.data]
        verb = "bind" if self.kind == "bind" else f"mount {self.fstype}"
        source = f" {self.source}" if self.kind == "bind" else ""
        return f"{verb}{source} on {self.destination}" + (f" ({','.join(flags)})" if flags else "")


def parse(fields: Fields) -> Mount:
    """One entry of `mounts`. Raises FieldError."""
    destination = "/" + fields.str("destination", required=True).strip("/")
    if destination == "/" or set(destination.split("/")) <= {"", ".", ".."}:
        raise fields.error("destination", "a mount cannot replace the root filesystem")
    if len(destination.encode("utf-8", "surrogateescape")) >= PATH_MAX:
        raise fields.error("destination", f"longer than {PATH_MAX - 1} bytes")
    fields.refuse("uidMappings", "gidMappings")
    fstype, source = fields.str("type"), fields.str("source")
    options = fields.strs("options")
    bind = fstype == "bind" or "bind" in options or "rbind" in options
    own, below = Attributes(), Attributes()
    propagation: list[tuple[int, bool]] = []
    data: list[tuple[str, str | None]] = []
    for index, option in enumerate(options):
        if option in ("bind", "rbind") or option in IGNORED:
            continue
        if option in ATTRIBUTES:
            own = own.plus(*ATTRIBUTES[option])
        elif option in PROPAGATION:
            propagation.append(PROPAGATION[option])
        elif option[:1] == "r" and option[1:] in ATTRIBUTES:
            below = below.plus(*ATTRIBUTES[option[1:]])
        elif option in REFUSED:
            raise fields.error(f"options[{index}]", f'"{option}" is not supported by this runtime yet')
        elif bind:
            raise fields.error(f"options[{index}]", f'unknown option "{option}" for a bind mount')
        else:
            key, equals, value = option.partition("=")
            data.append((key, value if equals else None))
    if bind and not source:
        raise fields.error("source", "is required for a bind mount")
    if not bind and not fstype:
        raise fields.error("type", "is required unless the options hold bind or rbind")
    kind = "bind" if bind else "cgroup" if fstype in ("cgroup", "cgroup2") else "filesystem"
    return Mount(
        destination=destination,
        kind=kind,
        fstype=fstype,
        source=source,
        recursive="rbind" in options,
        attributes=own,
        recursive_attributes=below,
        propagation=tuple(propagation),
        data=tuple(data),
        path=fields.path,
    )
