"""criu as a service for one request: `criu swrk 3` on a socket pair, spoken to in criu's own protobuf messages.

        ocirun                                    criu swrk (a child; of the container's cgroups for a restore)
          │  req DUMP | PRE_DUMP | RESTORE  ──────▶ │
          │ ◀──────  resp NOTIFY "network-lock"     │   criu waits for the answer at every such step
          │  req NOTIFY success ──────────────────▶ │
          │             …                           │
          │ ◀──────  resp DUMP | RESTORE            │

One message is one packet. Refuses to understand more of a message than is used here. Invariant: a request that fails
leaves no criu behind, and its error quotes what criu's log calls an error. The process is runtime.criu_child's.
"""

from __future__ import annotations

import os
import time

from runtime.criu_child import Child, Gone, Late
from runtime.errors import RuntimeFailure
from runtime.linux.files import AT_FDCWD, read_bounded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Value = bool | int | str | bytes | Sequence["Value"]
    # Called with the step's name, the pid that criu names (0: none) and an fd that came along (-1: none).
    Notified = Callable[[str, int, int], None]

# criu's images/rpc.proto: criu_req_type.
EMPTY, DUMP, RESTORE, CHECK, PRE_DUMP, PAGE_SERVER, NOTIFY = range(7)
FEATURE_CHECK, VERSION = 9, 10
_NAMES = {DUMP: "DUMP", RESTORE: "RESTORE", PRE_DUMP: "PRE_DUMP", NOTIFY: "NOTIFY", EMPTY: "EMPTY"}
# criu_opts, those fields that are used.
_OPTIONS = {
    "images_dir_fd": 1,
    "pid": 2,
    "leave_running": 3,
    "ext_unix_sk": 4,
    "tcp_established": 5,
    "evasive_devices": 6,
    "shell_job": 7,
    "file_locks": 8,
    "log_level": 9,
    "log_file": 10,
    "ps": 11,
    "notify_scripts": 12,
    "root": 13,
    "parent_img": 14,
    "track_mem": 15,
    "auto_dedup": 16,
    "work_dir_fd": 17,
    "link_remap": 18,
    "ext_mnt": 23,
    "manage_cgroups": 24,
    "cg_root": 25,
    "rst_sibling": 26,
    "inherit_fd": 27,
    "manage_cgroups_mode": 34,
    "external": 37,
    "empty_ns": 38,
    "join_ns": 39,
    "freeze_cgroup": 44,
    "tcp_skip_in_flight": 46,
    "lazy_pages": 48,
    "orphan_pts_master": 50,
    "config_file": 51,
    "lsm_profile": 53,
    "lsm_mount_context": 63,
}
FEATURES = {"mem_track": 1, "lazy_pages": 2}
_WORDS = {"mem_track": "tracking of changed memory, which a pre-dump needs", "lazy_pages": "lazy pages (userfaultfd)"}
_MAX_LOG = 4 << 20


def message(*fields: tuple[int, Value]) -> bytes:
    """A protobuf message of (number, value): bools and ints as varints, text and bytes by length, lists repeated."""
    return b"".join(_field(number, value) for number, value in fields)


def _field(number: int, value: Value) -> bytes:
    if isinstance(value, int):  # and bool
        return _varint(number << 3) + _varint(int(value))
    if isinstance(value, str):
        value = os.fsencode(value)
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return b"".join(_field(number, item) for item in value)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers take all of the 64 bits
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def fields(data: bytes) -> dict[int, int | bytes]:
    """A message's varint and length-delimited fields by number, the last of each; 32- and 64-bit ones are skipped.
    Raises RuntimeFailure where it is no protobuf."""
    return dict(_walk(data))


def repeated(data: bytes, number: int) -> list[bytes]:
    """All length-delimited fields of that number. Raises RuntimeFailure."""
    return [value for key, value in _walk(data) if key == number and isinstance(value, bytes)]


def _walk(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    try:
        while at < len(data):
            key, at = _read_varint(data, at)
            kind = key & 7
            if kind == 0:
                value, at = _read_varint(data, at)
                yield key >> 3, value
            elif kind == 2:
                length, at = _read_varint(data, at)
                if at + length > len(data):
                    raise IndexError
                yield key >> 3, data[at : at + length]
                at += length
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise IndexError
    except IndexError:
        raise RuntimeFailure("criu: this is no message of its protocol") from None


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError


def options(**values: Value) -> bytes:
    """A criu_opts message, by criu's names; empty texts and lists are left out."""
    return message(*((_OPTIONS[name], value) for name, value in values.items() if value not in ("", [])))


def pair(key: str, value: str | int) -> bytes:
    """ext_mount_map, inherit_fd, cgroup_root and join_namespace: two fields each."""
    return message((1, key), (2, value))


class Criu:
    """One criu program; each call starts it anew. With `seconds`, all of them together may take so long: a criu that is
    late is killed."""

    def __init__(self, program: str, seconds: float = 0.0) -> None:
        self._program = _find(program)
        self._version = 0
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds if seconds else None

    def version(self) -> int:
        """As criu counts: 31701 for 3.17.1."""
        if not self._version:
            answer = fields(_bytes(self._ask(message((1, VERSION))).get(10)))
            number = [answer.get(key, 0) for key in (1, 2, 4)]
            major, minor, patch = (part if isinstance(part, int) else 0 for part in number)
            self._version = major * 10000 + minor * 100 + patch
        return self._version

    def require(self, feature: str) -> None:
        """Raises RuntimeFailure unless criu and this kernel have the feature, one of FEATURES."""
        number = FEATURES[feature]
        answer = self._ask(message((1, FEATURE_CHECK), (5, message((number, True)))))
        if not fields(_bytes(answer.get(8))).get(number):
            raise RuntimeFailure(f"criu or this kernel lacks {_WORDS[feature]}", code="failed_precondition")

    def request(
        self,
        kind: int,
        opts: bytes | Callable[[int], bytes],
        *,
        log: str,
        notified: Notified,
        pass_fds: Sequence[int] = (),
        prepare: Callable[[], None] = lambda: None,
        adopt: Callable[[int], None] = lambda _pid: None,
        cgroup_fd: int = -1,
        late: Callable[[], object] = lambda: None,
        doomed: Callable[[], object] = lambda: None,
    ) -> dict[int, int | bytes]:
        """Sends one request and answers notifications until it is done. `pass_fds` are criu's fds from
        criu_child.FIRST_FD on. `prepare` runs in the child before it becomes criu, `adopt` here with its pid before
        that, `late` when criu is about to hear that its time is over, `doomed` when it has not heeded that and is about
        to be killed. `log` is where criu writes. Raises RuntimeFailure, "deadline" for a time that is over."""
        child = Child(self._program, self._deadline, pass_fds, prepare, adopt, cgroup_fd, doomed)
        try:
            wanted = opts(child.pid) if callable(opts) else opts
            child.send(message((1, kind), (2, wanted)))
            while True:
                data, fd = child.receive()
                answer = fields(data)
                try:
                    what = answer.get(1, -1)
                    if not answer.get(2):
                        raise RuntimeFailure(self._why(what, answer, log), hint=_HINT)
                    if what != NOTIFY:
                        break
                    step = fields(_bytes(answer.get(5)))
                    pid = step.get(2, 0)
                    notified(os.fsdecode(_bytes(step.get(1))), pid if isinstance(pid, int) else 0, fd)
                finally:
                    if fd >= 0:
                        os.close(fd)
                child.send(message((1, NOTIFY), (3, True)))
            child.end(may_fail=kind == PRE_DUMP)  # which waits for the next of a series: it is told by our end closing
            return answer
        except Gone as gone:
            raise RuntimeFailure(self._why(kind, {}, log) + f" ({gone})", hint=_HINT) from None
        except Late:
            late()
            raise self._too_late(log) from None
        finally:
            child.close()

    def _ask(self, request: bytes) -> dict[int, int | bytes]:
        """A request that is about criu itself."""
        child = Child(self._program, self._deadline)
        try:
            child.send(request)
            return fields(child.receive()[0])
        except Gone as gone:
            raise RuntimeFailure(f"criu does not work on this machine: {gone}", code="failed_precondition") from None
        except Late:
            raise self._too_late("") from None
        finally:
            child.close()

    def _too_late(self, log: str) -> RuntimeFailure:
        return RuntimeFailure(
            f"criu did not end within {self._seconds:g} s, and was killed{_where(log)}", code="deadline"
        )

    def _why(self, kind: object, answer: Mapping[int, int | bytes], log: str) -> str:
        name = _NAMES.get(kind, str(kind)) if isinstance(kind, int) else "?"
        said = _last_errors(log) or os.fsdecode(_bytes(answer.get(9))).strip()
        number = answer.get(7, 0)
        return f"criu failed: type {name} errno {number!r}: {said or 'it gives no reason'}{_where(log)}"


_HINT = "`criu check` says what this kernel lacks"


def _find(program: str) -> str:
    import shutil

    found = shutil.which(program)
    if found is None:
        raise RuntimeFailure(
            f'exec: "{program}": executable file not found in $PATH',
            hint="they need criu (Debian's package criu), or its path: --criu, or a node's checkpoint.criu",
            code="failed_precondition",
        )
    return os.path.abspath(found)


def _where(log: str) -> str:
    return f"\nlog file: {log}" if os.path.exists(log) else ""


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""


def _last_errors(log: str) -> str:
    """What a criu log calls errors, the last few: before them may be some that criu got over, the last is no news."""
    try:
        text = read_bounded(AT_FDCWD, log, _MAX_LOG).decode("utf-8", "replace")
    except (OSError, RuntimeFailure):
        return ""
    found = []
    for line in text.splitlines():
        _, mark, rest = line.partition("Error (")
        if mark and not rest.endswith("FAILED."):
            found.append((rest.partition("): ")[2] or rest).strip())
    return "; ".join(found[-3:])
