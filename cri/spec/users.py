"""Who a container runs as: numbers from the request, names looked up in the image's own passwd and group.

Refuses to guess: a number is never a name (CVE-2016-3697), a number out of range is an error and never root
(CVE-2024-40635, CVE-2026-46680), and the host's user database is never read. Invariant: the primary group is among
the supplementary groups (CVE-2023-25173), and every file of the image is read bounded and inside its root.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cri.spec.validate import InvalidRequest
from runtime.linux.dataclass import dataclass
from runtime.linux.files import read_bounded
from runtime.linux.libc import KernelError
from runtime.linux.mount import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY, FsMount

MAX_ID = 2**31 - 1
MAX_DATABASE = 1 << 20
MAX_GROUPS = 65536  # NGROUPS_MAX, limits.h
_MOST_KEPT, _MOST_SIZE = 64, 1 << 15
_USER_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_.][A-Za-z0-9_.-]*\$?", re.ASCII)


@dataclass(frozen=True, slots=True)
class User:
    """Numbers for the kernel, and the home directory that HOME is set to when nobody says otherwise."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True, slots=True)
class UserRequest:
    """What the CRI and the image say. `image_user` is the config's User; the other fields win over it."""

    image_user: str = ""
    uid: int | None = None
    gid: int | None = None
    username: str = ""
    supplemental: tuple[int, ...] = ()
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Database:
    """passwd(5) and group(5) of an image: (name, uid, gid, home) and (name, gid, members)."""

    passwd: tuple[tuple[str, int, int, str], ...] = ()
    group: tuple[tuple[str, int, tuple[str, ...]], ...] = ()


def number(field: str, text: str) -> int:
    """A uid or gid in ASCII decimal, 0..2^31-1."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) > MAX_ID:
        raise InvalidRequest(f"{field}: {text[:40]!r} is no number from 0 to {MAX_ID}")
    return int(text)


def _in_range(field: str, value: int) -> int:
    if not 0 <= value <= MAX_ID:
        raise InvalidRequest(f"{field}: {value} is not from 0 to {MAX_ID}")
    return value


def _lookup_name(field: str, name: str) -> str:
    if len(name) > 256 or not _USER_NAME.fullmatch(name):
        raise InvalidRequest(f"{field}: {name[:40]!r} is neither a number nor a name")
    return name


def resolve(request: UserRequest, database: Callable[[], Database]) -> User:
    """The user that `request` describes. `database` is asked only when a name or a default is needed.
    Raises InvalidRequest."""
    if request.uid is not None and request.username:
        raise InvalidRequest("run_as_username: not beside run_as_user, of which one may be given")
    user_text, _, group_text = request.image_user.partition(":")
    if request.uid is not None or request.username:
        user_text, group_text = request.username, ""
    elif request.gid is not None:
        raise InvalidRequest("run_as_group: needs run_as_user or run_as_username")
    entry: tuple[str, int, int, str] | None = None
    if request.uid is not None:
        uid = _in_range("run_as_user", request.uid)
        entry = next((line for line in database().passwd if line[1] == uid), None)
    elif not user_text or (user_text.isascii() and user_text.isdecimal()):
        uid = number("user", user_text or "0")
        entry = next((line for line in database().passwd if line[1] == uid), None)
    else:
        wanted = _lookup_name("user", user_text)
        entry = next((line for line in database().passwd if line[0] == wanted), None)
        if entry is None:
            raise InvalidRequest(f"user: the image's /etc/passwd has no user {wanted!r}")
        uid = _in_range("user", entry[1])
    gid = _primary_group(request, group_text, entry, database)
    groups = {gid, *(_in_range("supplemental_groups", group) for group in request.supplemental)}
    if not request.strict and entry is not None and not group_text:
        groups.update(group[1] for group in database().group if entry[0] in group[2])
    if len(groups) > MAX_GROUPS:
        raise InvalidRequest(f"supplemental_groups: {len(groups)} groups, the kernel takes {MAX_GROUPS}")
    home = entry[3] if entry is not None and _is_home(entry[3]) else "/"
    return User(uid, gid, (gid, *sorted(groups - {gid})), home)


def _primary_group(
    request: UserRequest, text: str, entry: tuple[str, int, int, str] | None, database: Callable[[], Database]
) -> int:
    if request.gid is not None:
        return _in_range("run_as_group", request.gid)
    if text:
        if text.isascii() and text.isdecimal():
            return number("group", text)
        wanted = _lookup_name("group", text)
        found = next((line[1] for line in database().group if line[0] == wanted), None)
        if found is None:
            raise InvalidRequest(f"group: the image's /etc/group has no group {wanted!r}")
        return _in_range("group", found)
    return _in_range("group", entry[2]) if entry is not None else 0


def _is_home(path: str) -> bool:
    # HOME goes into the environment; a control character in it has been used to forge lines elsewhere (CVE-2022-4318).
    return path.startswith("/") and path.isprintable() and len(path) < 4096


def parse_database(passwd: bytes, group: bytes) -> Database:
    """Lines that are not well formed are passed over, as getpwent(3) does."""
    users, groups = [], []
    for line in passwd.decode("utf-8", "surrogateescape").split("\n"):
        fields = line.rstrip("\r").split(":")
        if len(fields) >= 6 and _is_number(fields[2]) and _is_number(fields[3]):
            users.append((fields[0], int(fields[2]), int(fields[3]), fields[5]))
    for line in group.decode("utf-8", "surrogateescape").split("\n"):
        fields = line.rstrip("\r").split(":")
        if len(fields) >= 4 and _is_number(fields[2]):
            groups.append((fields[0], int(fields[2]), tuple(fields[3].split(","))))
    return Database(tuple(users), tuple(groups))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 10


def read_database(lower_directories: Sequence[Path]) -> Database:
    """passwd and group of the image whose layer directories these are, top first.

    The layers are seen through a detached read-only overlay, so that whiteouts and links across layers mean what they
    will mean in the container; it is attached nowhere and gone with its fd. A missing file is an empty one.
    Raises InvalidRequest where a file is no regular file or larger than MAX_DATABASE (threats S42).
    """
    if not lower_directories:
        return Database()
    if len(lower_directories) == 1:
        root = os.open(lower_directories[0], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    else:
        options = tuple(("lowerdir+", str(directory)) for directory in lower_directories)
        root = FsMount("overlay", "overlay", options, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID).make()
    try:
        return database_in(root)
    finally:
        os.close(root)


def _size(database: Database) -> int:
    """About how many bytes it takes: what an image writes there has no end but MAX_DATABASE."""
    names = [text for name, _, _, home in database.passwd for text in (name, home)]
    names += [text for name, _, members in database.group for text in (name, *members)]
    return sum(len(text) + 64 for text in names)


class Databases:
    """Those of the images that were asked for last. A chain id stands for one content of all files, so what was read
    once is right for as long as there are layers of that id; large ones are read each time. Any thread may ask."""

    def __init__(self) -> None:
        self._kept: dict[str, Database] = {}
        self._lock = threading.Lock()

    def of(self, chain_id: str, lower_directories: Callable[[], Sequence[Path]]) -> Database:
        """See `read_database`; `lower_directories` is called where it has to be read."""
        with self._lock:
            found = self._kept.pop(chain_id, None)
        if found is None:
            found = read_database(lower_directories())
        if _size(found) <= _MOST_SIZE:
            with self._lock:
                self._kept[chain_id] = found  # the last of them again
                while len(self._kept) > _MOST_KEPT:
                    del self._kept[next(iter(self._kept))]
        return found


def database_in(root: int) -> Database:
    """passwd and group below this directory. Raises InvalidRequest as `read_database`."""
    return parse_database(_read(root, "etc/passwd"), _read(root, "etc/group"))


def _read(root: int, path: str) -> bytes:
    try:
        return read_bounded(root, path, MAX_DATABASE, in_root=True)
    except KernelError as error:
        if error.errno in (2, 20):  # ENOENT, ENOTDIR: an image without users
            return b""
        raise InvalidRequest(f"image: /{path} cannot be used to look up users: {error}") from error
