"""The volumes of a pod file: emptyDir, hostPath and configMap, and where containers mount them.

Pure: what is to be made on disk is data, and made by who plays the pod. Refuses other kinds by their path, and paths
of config maps that lead elsewhere. Invariant: a mount is of a volume that the pod has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cri.api import api_pb2 as pb
from cri.podfile.values import name, only, unique
from runtime.fields import Fields
from runtime.linux.dataclass import dataclass

_PROPAGATION = {
    "": pb.PROPAGATION_PRIVATE,
    "None": pb.PROPAGATION_PRIVATE,
    "HostToContainer": pb.PROPAGATION_HOST_TO_CONTAINER,
    "Bidirectional": pb.PROPAGATION_BIDIRECTIONAL,
}
_HOST_TYPES = ("", "DirectoryOrCreate", "Directory", "File", "Socket")


@dataclass(frozen=True, slots=True)
class ConfigMap:
    """A document of kind ConfigMap."""

    name: str
    data: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Volume:
    """`host_path` for a path of the host, of that kind; else a directory of the pod with `files` (path, mode and
    content each), for everybody to write to where `writable`."""

    name: str
    host_path: str = ""
    host_type: str = ""
    writable: bool = False
    files: tuple[tuple[str, int, bytes], ...] = ()

    def source(self, directory: Path) -> str:
        """What is mounted, with the pod's volumes in `directory`."""
        return self.host_path or str(directory / self.name)


def volumes(spec: Fields, maps: Mapping[str, ConfigMap]) -> dict[str, Volume]:
    """Those of a pod by name. Raises FieldError."""
    found = [_volume(fields, maps) for fields in spec.objects("volumes")]
    unique(spec.at("volumes"), [volume.name for volume in found])
    return {volume.name: volume for volume in found}


def _volume(fields: Fields, maps: Mapping[str, ConfigMap]) -> Volume:
    only(fields, "name", "emptyDir", "hostPath", "configMap")
    kinds = [kind for kind in ("emptyDir", "hostPath", "configMap") if fields.has(kind)]
    if len(kinds) != 1:
        raise fields.error("", "expected one of emptyDir, hostPath, configMap")
    called, inner = name(fields), fields.required_object(kinds[0])
    if kinds[0] == "emptyDir":
        only(inner)
        return Volume(called, writable=True)
    if kinds[0] == "hostPath":
        only(inner, "path", "type")
        path = inner.str("path", required=True)
        if not path.startswith("/"):
            raise inner.error("path", f"{path[:80]!r} is not absolute")
        return Volume(called, host_path=path, host_type=inner.str("type", choices=_HOST_TYPES))
    return Volume(called, files=_files(only(inner, "name", "items", "defaultMode", "optional"), maps))


def _files(fields: Fields, maps: Mapping[str, ConfigMap]) -> tuple[tuple[str, int, bytes], ...]:
    wanted = fields.str("name", required=True)
    found, optional = maps.get(wanted), fields.bool("optional")
    if found is None and not optional:
        raise fields.error("name", f"there is no ConfigMap {wanted[:80]!r} in this file")
    data: Mapping[str, bytes] = {} if found is None else found.data
    mode = fields.int("defaultMode", 0, 0o777, 0o644)
    if not fields.list("items"):
        return tuple((key, mode, value) for key, value in data.items())
    files = []
    for item in fields.objects("items"):
        only(item, "key", "path", "mode")
        key, path = item.str("key", required=True), item.str("path", required=True)
        if path.startswith("/") or not all(part not in ("", ".", "..") for part in path.split("/")):
            raise item.error("path", f"{path[:80]!r} is no relative path without '..'")
        if key in data:
            files.append((path, item.int("mode", 0, 0o777, mode), data[key]))
        elif not optional:
            raise item.error("key", f"ConfigMap {wanted[:80]!r} has no {key[:80]!r}")
    return tuple(files)


def mounts(container: Fields, known: Mapping[str, Volume], directory: Path) -> list[pb.Mount]:
    """The mounts of a container. Raises FieldError."""
    made = []
    for fields in container.objects("volumeMounts"):
        only(fields, "name", "mountPath", "readOnly", "mountPropagation")
        volume = known.get(fields.str("name", required=True))
        if volume is None:
            raise fields.error("name", f"the pod has no volume {fields.str('name')[:80]!r}")
        path = fields.str("mountPath", required=True)
        if not path.startswith("/"):
            raise fields.error("mountPath", f"{path[:80]!r} is not absolute")
        made.append(
            pb.Mount(
                host_path=volume.source(directory),
                container_path=path,
                readonly=fields.bool("readOnly") or not (volume.writable or volume.host_path),
                propagation=_PROPAGATION[fields.str("mountPropagation", choices=_PROPAGATION)],
            )
        )
    return made


def config_map(document: Fields) -> ConfigMap:
    """A ConfigMap document. Raises FieldError."""
    import base64

    only(document, "apiVersion", "kind", "metadata", "data", "binaryData", "immutable")
    data = {key: value.encode("utf-8", "surrogateescape") for key, value in document.mapping("data").items()}
    for key, text in document.mapping("binaryData").items():
        try:
            data[key] = base64.b64decode(text, validate=True)
        except ValueError:
            raise document.error("binaryData", f"{key[:80]!r} is not base64") from None
    for key in data:
        if not key or "/" in key or key in (".", ".."):
            raise document.error("data", f"{key[:80]!r} can be no name of a file")
    metadata = only(document.required_object("metadata"), "name", "namespace", "labels", "annotations")
    return ConfigMap(name(metadata), data)
