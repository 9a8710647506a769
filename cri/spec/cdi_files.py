"""CDI spec files (Container Device Interface 1.0): what lies in the configured directories, as devices by their names.

    /etc/cdi/*.{json,yaml,yml}       of the operator
    /var/run/cdi/*.{json,yaml,yml}   of drivers; wins over the former for a device that both have

Refuses a file that others than root may write (a hook in it would run as root), one that is too large or of another
version, an unknown field, and a device that two files of one directory have. Invariant: a broken file spoils the
devices that it might have had and nothing else, and is named when one of those is asked for.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cri.spec.validate import InvalidRequest
from runtime.errors import RuntimeFailure
from runtime.fields import Fields, decode
from runtime.linux.dataclass import dataclass

VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
MAX_FILE = 4 << 20
MAX_FILES = 256
MAX_DEVICES = 8192
_SUFFIXES = (".json", ".yaml", ".yml")
# cdi SPEC.md, "Kind" and "Device Name".
_VENDOR = r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
_CLASS = r"[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?"
_DEVICE = r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?"
_KIND = re.compile(f"{_VENDOR}/{_CLASS}", re.ASCII)
_NAME = re.compile(_DEVICE, re.ASCII)
_QUALIFIED = re.compile(f"{_VENDOR}/{_CLASS}={_DEVICE}", re.ASCII)
_SPEC_FIELDS = {"cdiVersion", "kind", "annotations", "devices", "containerEdits"}
_DEVICE_FIELDS = {"name", "annotations", "containerEdits"}


@dataclass(frozen=True, slots=True)
class SpecFile:
    """One file: the edits that any of its devices brings along, and those of each device, not yet looked at."""

    path: str
    kind: str
    common: Fields
    devices: dict[str, Fields]


class Registry:
    """The devices in `directories`, later directories first."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._found: dict[str, tuple[SpecFile, Fields] | str] = {}
        self._broken: list[str] = []
        for directory in directories:
            here: dict[str, tuple[SpecFile, Fields] | str] = {}
            for file in self._files(directory):
                for name, edits in file.devices.items():
                    qualified = f"{file.kind}={name}"
                    other = here.get(qualified)
                    here[qualified] = (file, edits) if other is None else f"{file.path} has it, and another file there"
            self._found |= here
        if len(self._found) > MAX_DEVICES:
            raise InvalidRequest(f"CDI_devices: the spec files have more than {MAX_DEVICES} devices")

    def _files(self, directory: Path) -> Iterator[SpecFile]:
        try:
            names = sorted(name for name in os.listdir(directory) if name.endswith(_SUFFIXES))
        except (FileNotFoundError, NotADirectoryError):
            return
        if len(names) > MAX_FILES:
            raise InvalidRequest(f"CDI_devices: {directory} has more than {MAX_FILES} spec files")
        for name in names:
            path = f"{directory}/{name}"
            try:
                yield read(path)
            except (OSError, ValueError, RecursionError, RuntimeFailure) as error:
                self._broken.append(f"{path}: {error}")

    def find(self, name: str) -> tuple[SpecFile, Fields]:
        """The file and the edits of a device. Raises InvalidRequest."""
        if len(name) > 512 or not _QUALIFIED.fullmatch(name):
            raise InvalidRequest(f"CDI_devices: {name[:80]!r} is no device name, such as vendor.com/class=name")
        found = self._found.get(name)
        if found is None:
            broken = f"; unusable spec files: {'; '.join(self._broken[:3])}" if self._broken else ""
            raise InvalidRequest(f"CDI_devices: unresolvable CDI devices {name}{broken}")
        if isinstance(found, str):
            raise InvalidRequest(f"CDI_devices: {name} is ambiguous: {found}")
        return found


def read(path: str) -> SpecFile:
    """A spec file. Raises OSError, ValueError, RuntimeFailure."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no regular file")
        if status.st_uid != 0 or status.st_mode & 0o022:
            raise ValueError("may be written by others than root")
        if status.st_size > MAX_FILE:
            raise ValueError(f"is larger than {MAX_FILE} bytes")
        return _parsed(path, fd, (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size))
    finally:
        os.close(fd)


_cache: dict[str, tuple[tuple[int, ...], SpecFile]] = {}


def _parsed(path: str, fd: int, identity: tuple[int, ...]) -> SpecFile:
    """Drivers write hundreds of kilobytes of YAML, which takes longer to read than a container to start."""
    known = _cache.get(path)
    if known is not None and known[0] == identity:
        return known[1]
    with os.fdopen(os.dup(fd), "rb") as file:
        raw = file.read(MAX_FILE + 1)
    document = decode(raw) if path.endswith(".json") else _yaml(raw)
    parsed = _spec(path, Fields(document))
    if len(_cache) > MAX_FILES:
        _cache.clear()
    _cache[path] = identity, parsed
    return parsed


def _yaml(raw: bytes) -> Any:
    import yaml  # only on nodes with such files

    try:
        return yaml.load(raw, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader without aliases, which make much out of little, and without duplicate keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        """See above."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise ValueError("aliases are not accepted")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
                raise ValueError("a key is no string, or is there twice")
            return super().construct_mapping(node, deep)

    return Loader


def _spec(path: str, fields: Fields) -> SpecFile:
    known(fields, _SPEC_FIELDS)
    fields.str("cdiVersion", required=True, choices=VERSIONS)
    kind = fields.str("kind", required=True)
    if len(kind) > 256 or not _KIND.fullmatch(kind):
        raise fields.error("kind", f"{kind[:80]!r} is not vendor.com/class")
    fields.object("annotations")
    devices: dict[str, Fields] = {}
    for entry in fields.objects("devices"):
        known(entry, _DEVICE_FIELDS)
        name = entry.str("name", required=True)
        if len(name) > 256 or not _NAME.fullmatch(name):
            raise entry.error("name", f"{name[:80]!r} is no device name")
        if name in devices:
            raise entry.error("name", f"{name!r} is there twice")
        entry.object("annotations")
        devices[name] = entry.required_object("containerEdits")
    if not devices:
        raise fields.error("devices", "is empty")
    common = fields.object("containerEdits")
    return SpecFile(path, kind, common if common is not None else Fields({}, "containerEdits"), devices)


def known(fields: Fields, names: set[str]) -> None:
    """Raises FieldError for a field that is none of `names`."""
    for name in fields.names():
        if name not in names:
            raise fields.error(name, f"unknown field; known here: {', '.join(sorted(names))}")
