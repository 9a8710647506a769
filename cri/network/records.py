"""What ocid knows of each pod's network, on disk before anything is done: DIRECTORY/POD.json.

Refuses to guess: a record that cannot be read is reported and treated as none. Invariant: the record is there before
the first plugin is called and until the last DEL was right, so a daemon killed in between finds what to undo, with
the configuration that was used (threats O2, O3). It lies on a tmpfs: a reboot takes it together with the namespaces.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cri.interfaces import PodNetwork, PortMapping
from cri.network.conflist import ConfigError, Conflist, field, is_name, parse_json, parse_list
from cri.network.values import Result, parse_result
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded, write_durable

log = logging.getLogger(__name__)

_VERSION = 1
_SIZE_LIMIT = 8 << 20  # a conflist and a result of at most a mebibyte each, escaped


@dataclass(frozen=True, slots=True)
class Record:
    """A pod's network: what was asked, with which configuration, and the answer once there was one.

    `namespace` identifies the netns (device, inode): a name may come back, the namespace does not."""

    pod: PodNetwork
    conflist: Conflist
    interface: str
    namespace: tuple[int, int]
    result: Result | None


def _encode(record: Record) -> bytes:
    pod = asdict(record.pod)
    pod["netns"] = str(record.pod.netns)
    pod["capabilities"], pod["sysctls"] = dict(record.pod.capabilities), dict(record.pod.sysctls)
    document = {
        "version": _VERSION,
        "pod": pod,
        "conflist": record.conflist.document(),
        "interface": record.interface,
        "namespace": list(record.namespace),
        "result": dict(record.result.raw) if record.result is not None else None,
    }
    return json.dumps(document).encode()


def _pod(document: dict[str, Any]) -> PodNetwork:
    words = {key: field(document, key, str, "", "pod.") for key in ("id", "name", "namespace", "uid", "network")}
    ports = tuple(
        PortMapping(
            field(item, "host_port", int, 0),
            field(item, "container_port", int, 0),
            field(item, "protocol", str, "tcp"),
            field(item, "host_ip", str, ""),
        )
        for item in field(document, "ports", list, [], "pod.")
    )
    capabilities = field(document, "capabilities", dict, {}, "pod.")
    netns = Path(field(document, "netns", str, "", "pod."))
    sysctls = field(document, "sysctls", dict, {}, "pod.")
    return PodNetwork(**words, netns=netns, ports=ports, capabilities=capabilities, sysctls=sysctls)


def _decode(data: bytes, source: str) -> Record:
    document = parse_json(data, source)
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ConfigError(f"{source}: not a record of version {_VERSION}")
    conflist = parse_list(document.get("conflist"), source)
    raw = field(document, "result", dict, None)
    device, inode = field(document, "namespace", list, [0, 0])
    result = parse_result(raw, conflist.version) if raw is not None else None
    pod = _pod(field(document, "pod", dict, {}))
    return Record(pod, conflist, field(document, "interface", str, "eth0"), (int(device), int(inode)), result)


def is_alive(record: Path | None) -> bool:
    """Whether what carries this record's path still belongs to a pod, of this ocid or of another on the machine."""
    return record is not None and record.is_absolute() and record.exists()


class Records:
    """The records in `directory`, one file a pod."""

    __slots__ = ("_directory",)

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, pod: str) -> Path:
        """Where the pod's record is, or would be."""
        return self._directory / f"{pod}.json"

    def write(self, record: Record) -> None:
        """Replaces the pod's record. Raises OSError."""
        path = self.path(record.pod.id)
        try:
            write_durable(path, _encode(record), sync=False)
        except FileNotFoundError:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durable(path, _encode(record), sync=False)

    def read(self, pod: str) -> Record | None:
        """The pod's record; one that is damaged is none, after a warning."""
        path = self.path(pod)
        try:
            return _decode(read_bounded(AT_FDCWD, str(path), _SIZE_LIMIT), str(path))
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.warning("cannot read the network record of pod %s: %s", pod, error)
        except (ConfigError, TypeError, ValueError) as error:
            log.warning("the network record of pod %s is damaged: %s", pod, error)
        return None

    def remove(self, pod: str) -> None:
        """Missing: no-op."""
        self.path(pod).unlink(missing_ok=True)

    def pods(self) -> list[str]:
        """The ids of all pods with a record, damaged ones too."""
        stems = [name.removesuffix(".json") for name in self._names() if name.endswith(".json")]
        return sorted(stem for stem in stems if is_name(stem))

    def sweep(self) -> None:
        """Removes what a writer that was killed left: hidden names with another process's pid in them."""
        for name in self._names():
            if name.startswith(".") and f".json.{os.getpid()}." not in name:
                (self._directory / name).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._directory)
        except FileNotFoundError:
            return []
