"""Mount entries of config.json: their options read into what the new mount API takes, pure and without a kernel.

Options are runc's. One that nobody knows goes to the filesystem as data; a bind mount has no filesystem to take it, and
refuses. Invariant: a bind mount without any option for its own attributes keeps those of its source; with one it gets
exactly what is asked for, as in the peers, unless those of the source are locked (`own_attributes`): then nothing is
lifted, and asking for that by name is an error.
"""

from __future__ import annotations

from runtime.fields import FieldError
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
    MS_DIRSYNC,
    MS_I_VERSION,
    MS_LAZYTIME,
    MS_MANDLOCK,
    MS_PRIVATE,
    MS_SHARED,
    MS_SILENT,
    MS_SLAVE,
    MS_SYNCHRONOUS,
    MS_UNBINDABLE,
)
from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.fields import Fields
    from runtime.spec_namespaces import IdMapping

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
    "norelatime": (0, 0),  # mount(2) takes relatime when nothing else is asked for
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
# Flags of the filesystem itself, as mount(2) has them: (set, clear). A bind mount has none of its own: the kernel
# ignores them there, and so do we.
SUPERBLOCK = {
    "sync": (MS_SYNCHRONOUS, 0),
    "async": (0, MS_SYNCHRONOUS),
    "dirsync": (MS_DIRSYNC, 0),
    "lazytime": (MS_LAZYTIME, 0),
    "nolazytime": (0, MS_LAZYTIME),
    "mand": (MS_MANDLOCK, 0),
    "nomand": (0, MS_MANDLOCK),
    "iversion": (MS_I_VERSION, 0),
    "noiversion": (0, MS_I_VERSION),
    "silent": (MS_SILENT, 0),
    "loud": (0, MS_SILENT),
}
# What only runtimes know.
EXTENSIONS = frozenset({"bind", "rbind", "remount", "defaults", "tmpcopyup", "idmap", "ridmap"})
PATH_MAX = 4096  # linux/limits.h
_SUBDIR = "X-mount.subdir="  # mount(8); for new filesystems only, a bind mount has its source
# What mount_namespaces(7) calls locked: a mount that comes from a more privileged namespace keeps these.
_LOCKABLE = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
_SETTABLE = _LOCKABLE | MOUNT_ATTR_NOSYMFOLLOW


class Attributes(Record):
    """Bits for mount_setattr(2): what to clear by name, and what to set then."""

    set: int = 0
    clear: int = 0


_NO_ATTRIBUTES = Attributes()


def _plus(bits: tuple[int, int], more: tuple[int, int]) -> tuple[int, int]:
    """Bits of Attributes, set and clear, with one more option applied, the later winning."""
    set_, clear = more
    cleared = bits[1] & ~set_ | clear
    if cleared & MOUNT_ATTR_ATIME:
        cleared |= MOUNT_ATTR_ATIME  # mount_setattr(2): all of the field or nothing
    return bits[0] & ~clear | set_, cleared


class IdMap(Record):
    """Ids of a mount of its own. Without mappings: those of the container's user namespace."""

    recursive: bool
    uids: tuple[IdMapping, ...] = ()
    gids: tuple[IdMapping, ...] = ()


class Mount(Record):
    """One entry of config.json's mounts.

    `kind` is "bind", "cgroup", "filesystem" or "remount" (of what is there already). `attributes` are for this mount,
    `named` says that any option about them was given; `recursive_attributes` are for all below it too; `superblock` are
    MS_* bits, `data` goes to the filesystem. `subdir` is the directory in a new filesystem that is mounted in its
    place, "" for all of it. `path` is the entry's place in config.json, for errors.
    """

    destination: str
    kind: str
    fstype: str
    source: str = ""
    recursive: bool = False
    attributes: Attributes = Attributes()
    named: bool = False
    recursive_attributes: Attributes = Attributes()
    propagation: tuple[tuple[int, bool], ...] = ()
    superblock: int = 0
    data: tuple[tuple[str, str | None], ...] = ()
    idmap: IdMap | None = None
    copy_up: bool = False
    subdir: str = ""
    path: str = ""

    @property
    def read_only(self) -> bool:
        return bool(self.attributes.set & MOUNT_ATTR_RDONLY)

    def describe(self) -> str:
        """As an error prints it: source, target and flags by name."""
        flags = _names(self.attributes) + [f"r{name}" for name in _names(self.recursive_attributes)]
        flags += [name for name, (set_, _) in SUPERBLOCK.items() if self.superblock & set_]
        flags += [name for name, value in PROPAGATION.items() if value in self.propagation]
        if self.idmap is not None:
            flags.append("ridmap" if self.idmap.recursive else "idmap")
        if self.copy_up:
            flags.append("tmpcopyup")
        if self.subdir:
            flags.append(f"{_SUBDIR}{self.subdir:.80}")
        flags += [key if value is None else f"{key}={value}" for key, value in self.data]
        if self.kind == "remount":
            what = "remount"
        elif self.kind == "bind":
            what = f"bind {self.source} on"
        elif self.source in ("", self.fstype):
            what = f"mount {self.fstype} on"
        else:
            what = f"mount {self.fstype} {self.source:.80} on"
        return f"{what} {self.destination}" + (f" ({','.join(flags)})" if flags else "")


def _names(attributes: Attributes) -> list[str]:
    """Of the bits that are set, and of those that are taken away by name."""
    found = [name for name, (set_, _) in ATTRIBUTES.items() if set_ and attributes.set & set_]
    return found + [
        name for name, (set_, clear) in ATTRIBUTES.items() if not set_ and clear & attributes.clear & _SETTABLE
    ]


def own_attributes(mount: Mount, current: int, *, locked: bool) -> Attributes | None:
    """What mount_setattr(2) is to be asked for on the mount of a bind or a remount that has `current` now; None: that
    would lift a locked attribute which the options name. See the module for the rule."""
    wanted = mount.attributes
    if not mount.named:
        return Attributes()
    kept = current & _LOCKABLE if locked else 0
    if kept & wanted.clear:
        return None
    clear = wanted.clear | _SETTABLE & ~wanted.set & ~kept
    if clear & MOUNT_ATTR_ATIME:
        clear |= MOUNT_ATTR_NODIRATIME & ~wanted.set
    return Attributes(wanted.set, clear)


class _Options:
    """The options of one entry, sorted into what they are about."""

    def __init__(self, fields: Fields, options: tuple[str, ...], *, bind: bool) -> None:
        own, below, self.named = (0, 0), (0, 0), False
        self.propagation: list[tuple[int, bool]] = []
        self.superblock = 0
        self.data: list[tuple[str, str | None]] = []
        self.subdir = ""
        for index, option in enumerate(options):
            if option in EXTENSIONS:
                continue
            if option in ATTRIBUTES:
                own, self.named = _plus(own, ATTRIBUTES[option]), True
            elif option in PROPAGATION:
                self.propagation.append(PROPAGATION[option])
            elif option in SUPERBLOCK:
                set_, clear = SUPERBLOCK[option]
                self.superblock, self.named = self.superblock & ~clear | set_, True
            elif option[:1] == "r" and option[1:] in ATTRIBUTES:
                below = _plus(below, ATTRIBUTES[option[1:]])
            elif option.startswith(_SUBDIR) and not bind:
                self.subdir = option.removeprefix(_SUBDIR)
            elif bind:
                problem = f'unknown option "{option:.80}" for a bind mount: it has no filesystem of its own to take it'
                raise fields.error(f"options[{index}]", problem)
            else:
                self._add_data(option)
        # Nothing is below a new filesystem.
        self.own = Attributes(*(own if bind else _plus(own, below)))
        self.below = Attributes(*below) if bind and below != (0, 0) else _NO_ATTRIBUTES

    def _add_data(self, option: str) -> None:
        # mount(2) takes all of it as one string: an option may hold several, and a comma may be escaped (overlay) or
        # quoted (labels).
        if '"' not in option and "\\" not in option:
            self.data += [_pair(word) for word in option.split(",") if word]
            return
        word, quoted, escaped = "", False, False
        for char in f"{option},":
            if char == "," and not quoted and not escaped:
                if word:
                    self.data.append(_pair(word))
                word = ""
            else:
                word += char
            quoted ^= char == '"'
            escaped = char == "\\" and not escaped


def _pair(word: str) -> tuple[str, str | None]:
    key, equals, value = word.partition("=")
    return key, value if equals else None


def parse(fields: Fields) -> Mount:
    """One entry of `mounts`. Raises FieldError."""
    destination = _destination(fields)
    fstype, source = fields.str("type"), fields.str("source")
    options = fields.strs("options")
    bind = fstype == "bind" or "bind" in options or "rbind" in options
    remount = "remount" in options
    found = _Options(fields, options, bind=bind)
    if bind and not source and not remount:
        raise fields.error("source", "is required for a bind mount")
    if not bind and not fstype and not remount:
        raise fields.error("type", "is required unless the options hold bind or rbind")
    kind = "bind" if bind else "cgroup" if fstype in ("cgroup", "cgroup2") else "filesystem"
    return Mount(
        destination=destination,
        kind="remount" if remount else kind,
        fstype="bind" if bind else fstype,
        source=source,
        recursive="rbind" in options,
        attributes=found.own,
        named=found.named,
        recursive_attributes=found.below,
        propagation=tuple(found.propagation),
        superblock=found.superblock,
        data=tuple(found.data),
        idmap=_idmap(fields, options, bind=bind),
        copy_up="tmpcopyup" in options and fstype == "tmpfs",
        subdir=found.subdir,
        path=fields.path,
    )


def _destination(fields: Fields) -> str:
    """From the root of the container, also where it is given relative (deprecated by the specification, in use)."""
    destination = "/" + fields.str("destination", required=True).strip("/")
    if destination == "/" or set(destination.split("/")) <= {"", ".", ".."}:
        raise fields.error("destination", "a mount cannot replace the root filesystem")
    if len(destination.encode("utf-8", "surrogateescape")) >= PATH_MAX:
        raise fields.error("destination", f"longer than {PATH_MAX - 1} bytes")
    return destination


def _idmap(fields: Fields, options: tuple[str, ...], *, bind: bool) -> IdMap | None:
    asked = [option for option in options if option in ("idmap", "ridmap")]
    if not asked and not fields.has("uidMappings") and not fields.has("gidMappings"):
        return None
    from runtime.spec_namespaces import mappings

    uids, gids = mappings(fields, "uidMappings"), mappings(fields, "gidMappings")
    if not bind and fields.str("type") != "overlay":  # of an overlay the layers are mapped
        where = "options" if asked else "uidMappings"
        raise fields.error(where, "id-mapped mounts are only supported for bind-mounts")
    if bool(uids) != bool(gids):
        missing = "gidMappings" if uids else "uidMappings"
        raise fields.error(missing, "id-mapped mounts must have both uid and gid mappings specified")
    return IdMap("ridmap" in asked[-1:], uids, gids) if asked or uids else None


def init_propagation(wanted: tuple[int, bool] | None) -> tuple[int, bool]:
    """linux.rootfsPropagation as the init begins with it: what becomes unbindable in the end has to be bound first."""
    kind, recursive = wanted or (MS_SLAVE, True)
    return MS_PRIVATE if kind == MS_UNBINDABLE else kind, recursive


def check_idmaps(mounts: tuple[Mount, ...], *, user_namespace: bool) -> None:
    """Raises FieldError for an entry without mappings in a container without any."""
    for mount in mounts:
        if mount.idmap is not None and not mount.idmap.uids and not user_namespace:
            problem = "id-mapped mounts must have both uid and gid mappings specified"
            raise FieldError(f"{mount.path}.options", f"{problem}: there is no user namespace to take them from")


def known_options() -> list[str]:
    """Every option that is not passed on as data, sorted (`ocirun features`)."""
    recursive = [f"r{name}" for name in ATTRIBUTES]
    return sorted({*EXTENSIONS, *ATTRIBUTES, *recursive, *PROPAGATION, *SUPERBLOCK})
