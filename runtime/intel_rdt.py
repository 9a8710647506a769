"""`linux.intelRdt`: the class of service of a container's cache and memory bandwidth, in a mounted resctrl filesystem.

Refuses names that could leave that filesystem (threats S19), and to change a class that somebody else has made.
Invariant: the group is removed with the container iff this runtime made it for the container alone; a plan that fails
leaves what it found. See Documentation/filesystems/resctrl.rst.
"""

from __future__ import annotations

import errno
import os

from runtime.errors import RuntimeFailure
from runtime.linux.files import AT_FDCWD, read_bounded, write_all
from runtime.linux.mount import mountinfo
from runtime.linux.record import Record

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from runtime.fields import Fields

# The directories that resctrl itself keeps in its root and in each group.
_RESERVED = frozenset({".", "..", "info", "mon_groups", "mon_data"})
_MAX_FILE = 1 << 16


class IntelRdt(Record):
    """What config.json asks for. `clos` "" is the container's own class, "/" the default one."""

    clos: str = ""
    schemata: tuple[str, ...] = ()
    monitoring: bool = False


class Group(Record):
    """Where a container is: its class's directory, and its monitoring group ("" without). `own`: made for it alone."""

    directory: str
    monitor: str = ""
    own: bool = False


def parse(fields: Fields) -> IntelRdt:
    """The object `linux.intelRdt`. Raises FieldError naming what is wrong by its path."""
    clos = fields.str("closID")
    if clos != "/" and (clos in _RESERVED or "/" in clos or "\n" in clos or len(clos) > 255):
        raise fields.error("closID", f"{clos[:60]!r} is no name of a class of service")
    lines = [_line(fields, "l3CacheSchema", fields.str("l3CacheSchema")), fields.str("memBwSchema")]
    if lines[1] and not _line(fields, "memBwSchema", lines[1]).startswith("MB:"):
        raise fields.error("memBwSchema", f'expected a schema that starts with MB:, got "{lines[1]:.60}"')
    lines += [_line(fields, f"schemata[{index}]", line) for index, line in enumerate(fields.strs("schemata"))]
    # Before 1.3 monitoring was asked for in two halves.
    monitoring = any(fields.bool(key) for key in ("enableMonitoring", "enableCMT", "enableMBM"))
    return IntelRdt(clos, tuple(line for line in lines if line), monitoring)


def _line(fields: Fields, key: str, text: str) -> str:
    if "\n" in text or len(text) > 4096:
        raise fields.error(key, "must be one line")
    return text


def mount_point() -> str:
    """Where resctrl is mounted. Raises RuntimeFailure where it is not."""
    found = [point.target for point in mountinfo() if point.fstype == "resctrl"]
    if not found:
        raise RuntimeFailure(
            "linux.intelRdt: intelRdt is specified in config, but Intel RDT is not supported or enabled",
            step="intelRdt",
            hint="mount resctrl on /sys/fs/resctrl, on a machine whose processors have it",
            code="failed_precondition",
        )
    return found[0]


class Membership:
    """A container's place in resctrl while it is made: found, joined, and left again when the rest fails."""

    def __init__(self, wanted: IntelRdt, container_id: str) -> None:
        self._wanted, self._id = wanted, container_id
        self._root = mount_point()  # looked for before anything is made
        self.group: Group | None = None

    def plan(self) -> Group:
        """What `join` is going to make, to be noted before: a kill in between must leave nothing (threats O37)."""
        directory, monitor = _places(self._wanted, self._id, self._root)
        return Group(directory, monitor, not self._wanted.clos and not os.path.isdir(directory))

    def join(self) -> None:
        self.group = join(self._wanted, self._id, self._root)

    def enter(self, pid: int) -> None:
        if self.group is not None:
            enter(self.group, pid)

    def leave(self) -> None:
        if self.group is not None:
            leave(self.group)


def join(wanted: IntelRdt, container_id: str, root: str) -> Group:
    """Makes or finds the class below `root`, sets it up, and makes the monitoring group. Raises RuntimeFailure; then
    nothing that was made here is left."""
    directory, monitor = _places(wanted, container_id, root)
    made: list[str] = []
    try:
        if directory != root and _made(directory, must_exist=bool(wanted.clos and not wanted.schemata)):
            made.append(directory)
        if wanted.schemata and wanted.clos and not made:
            _compare(directory, wanted.schemata)
        elif wanted.schemata:
            _write_schemata(directory, wanted.schemata)
        if monitor and _made(monitor, must_exist=False):
            made.append(monitor)
        return Group(directory, monitor, bool(made) and made[0] == directory and not wanted.clos)
    except BaseException as error:
        for path in reversed(made):
            os.rmdir(path)
        if isinstance(error, OSError):
            what = f"linux.intelRdt: join the class of service {directory}"
            raise RuntimeFailure.of(error, step="intelRdt", what=what) from None
        raise


def _places(wanted: IntelRdt, container_id: str, root: str) -> tuple[str, str]:
    """The class's directory and that of the monitoring group, or ""."""
    if container_id in _RESERVED:
        raise RuntimeFailure(f"linux.intelRdt: {container_id} is a directory of resctrl's own", code="invalid_argument")
    directory = root if wanted.clos == "/" else f"{root}/{wanted.clos or container_id}"
    return directory, f"{directory}/mon_groups/{container_id}" if wanted.monitoring else ""


def _made(path: str, *, must_exist: bool) -> bool:
    """True when the directory was made here."""
    if must_exist:
        if not os.path.isdir(path):
            problem = f"there is no class of service {os.path.basename(path)}, and no schema to make it with"
            raise RuntimeFailure(f"linux.intelRdt.closID: {problem}", step="intelRdt", code="invalid_argument")
        return False
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return False
    except OSError as error:
        what = "linux.intelRdt: make a class of service or monitoring group"
        failure = RuntimeFailure.of(error, step="intelRdt", what=what)
        if error.errno == errno.ENOSPC:
            failure.hint = "the processor has no further class or monitor to give"
        raise failure from None
    return True


def _schemata(directory: str) -> dict[str, str]:
    """The schemata file by resource: {"L3": "0=7f0;1=1f", …}."""
    text = read_bounded(AT_FDCWD, f"{directory}/schemata", _MAX_FILE).decode("ascii", "replace")
    rows = (line.strip().partition(":") for line in text.splitlines())
    return {name: value for name, _, value in rows}


def _domains(value: str) -> dict[str, str]:
    """ "0=7f0;1=1f" by domain; masks without their leading zeros."""
    pairs = (part.strip().partition("=") for part in value.split(";"))
    return {domain: mask.strip().lower().lstrip("0") for domain, _, mask in pairs}


def _compare(directory: str, lines: tuple[str, ...]) -> None:
    """Somebody else's class is joined only as it is."""
    held = _schemata(directory)
    for line in lines:
        name, _, value = line.strip().partition(":")
        now = _domains(held.get(name, ""))
        if any(now.get(domain) != mask for domain, mask in _domains(value).items()):
            raise RuntimeFailure(
                f"linux.intelRdt: the class of service {os.path.basename(directory)} exists, and its schemata "
                f"{name}:{held.get(name, '')} is not the {line} that is asked for",
                step="intelRdt",
                code="failed_precondition",
            )


def _write_schemata(directory: str, lines: tuple[str, ...]) -> None:
    line = lines[0] if lines else ""
    try:
        fd = os.open(f"{directory}/schemata", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            for line in lines:
                write_all(fd, f"{line}\n".encode())
        finally:
            os.close(fd)
    except OSError as error:
        what = f"linux.intelRdt: write {line!r} to {directory}/schemata"
        failure = RuntimeFailure.of(error, step="intelRdt", what=what, code="invalid_argument")
        failure.hint = _text(f"{_root(directory)}/info/last_cmd_status")  # which says more than an errno
        raise failure from None


def enter(group: Group, pid: int) -> None:
    """Moves a process into the class and its monitoring group; its children follow. Raises RuntimeFailure."""
    for directory in filter(None, (group.directory, group.monitor)):
        try:
            fd = os.open(f"{directory}/tasks", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                write_all(fd, str(pid).encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise RuntimeFailure.of(error, step="intelRdt", what=f"linux.intelRdt: join {directory}") from None


def leave(group: Group) -> None:
    """Removes what `join` made for the container alone. What is gone already is fine."""
    for path in (group.monitor, group.directory if group.own else ""):
        if path:
            try:
                os.rmdir(path)
            except FileNotFoundError:
                pass


def update(group: Group, lines: tuple[str, ...]) -> tuple[str, ...]:
    """Writes schemata of a container that is in its own class; returns the lines that take it back."""
    held = _schemata(group.directory)
    before = tuple(f"{name}:{held[name]}" for line in lines if (name := line.partition(":")[0]) in held)
    try:
        _write_schemata(group.directory, lines)
    except RuntimeFailure as failure:
        try:
            _write_schemata(group.directory, before)
        except RuntimeFailure as second:
            failure.add_note(f"and could not go back: {second}")
        raise
    return before


def figures(group: Group | None) -> dict[str, object]:
    """The `intel_rdt` of runc's stats event. What the machine has not is left out."""
    if group is None:
        return {}
    root = _root(group.directory)
    found: dict[str, object] = {}
    for resource, info, names, key in (
        ("L3", "l3_cache_info", ("cbm_mask", "min_cbm_bits", "num_closids"), "l3_cache_schema"),
        ("MB", "mem_bw_info", ("bandwidth_gran", "delay_linear", "min_bandwidth", "num_closids"), "mem_bw_schema"),
    ):
        if not os.path.isdir(f"{root}/info/{resource}"):
            continue
        values = {name: _text(f"{root}/info/{resource}/{name}") for name in names}
        found[info] = {
            name: int(text) if text.isdigit() and name != "cbm_mask" else text for name, text in values.items()
        }
        for suffix, directory in (("_root", root), ("", group.directory)):
            value = _schemata(directory).get(resource, "")
            found[f"{key}{suffix}"] = f"{resource}:{value}"
    found["schemata"] = [f"{name}:{value}" for name, value in _schemata(group.directory).items()]
    monitor = group.monitor or group.directory
    counters: dict[str, tuple[str, ...]] = {
        "mbm_stats": ("mbm_total_bytes", "mbm_local_bytes"),
        "cmt_stats": ("llc_occupancy",),
    }
    for kind, files in counters.items():
        rows = [
            {name: int(text) for name in files if (text := _text(f"{monitor}/mon_data/{domain}/{name}")).isdigit()}
            for domain in _listed(f"{monitor}/mon_data")
        ]
        if any(rows):
            found[kind] = [row for row in rows if row]
    return found


def _root(directory: str) -> str:
    """resctrl's own: the default class, which alone has `info`; all others lie right below it."""
    return directory if os.path.isdir(f"{directory}/info") else os.path.dirname(directory)


def _text(path: str) -> str:
    try:
        return read_bounded(AT_FDCWD, path, _MAX_FILE).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _listed(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []
