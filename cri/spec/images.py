"""Mounts of images (image volumes): the layers of an image, read-only, at a path of the container.

Refuses what would not be an image alone: a host path beside it, a mount that is not read-only, propagation to the host
or ids that are not the pod's.
Invariant: nothing is mounted on the host; the container's own mount namespace has the overlay, and a snapshot keeps its
layers for as long as the container is there. Set-user-id and devices of a foreign image mean nothing unless
mount_options says so.
"""

from __future__ import annotations

import posixpath
from typing import Any

from cri.api import api_pb2 as pb
from cri.interfaces import FsMount, IdMap
from cri.spec import userns
from cri.spec.validate import InvalidRequest
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class ImageMount:
    """What `Mount.image` became: the image, and its layers as a mount, whose files have the `ids` of the pod's user
    namespace."""

    id: str
    layers: FsMount
    ids: IdMap | None


def check(field: str, mount: pb.Mount) -> str:
    """The name of the image that `mount` shows. Raises InvalidRequest."""
    name: str = mount.image.image
    if not name:
        raise InvalidRequest(f"{field}.image: the name is empty")
    if mount.host_path:
        raise InvalidRequest(f"{field}.host_path: must be empty for a mount of an image")
    if not mount.readonly:
        raise InvalidRequest(f"{field}.readonly: a mount of an image is read-only")
    if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL:
        raise InvalidRequest(f"{field}.propagation: a mount of an image is the container's own")
    sub_path(field, mount.image_sub_path)
    return name


def sub_path(field: str, path: str) -> str:
    """A relative path without "..", "" for the whole image. Links in it are followed inside the image only, by the
    runtime. Raises InvalidRequest."""
    clean = posixpath.normpath(path) if path else ""
    if path.startswith("/") or ".." in path.split("/") or "\0" in path or len(path) > 4095:
        raise InvalidRequest(f"{field}.image_sub_path: {path[:80]!r} must be a relative path without '..'")
    return "" if clean == "." else clean


def build(field: str, mount: pb.Mount, target: str, options: list[str], found: ImageMount) -> dict[str, Any]:
    """runtime-spec's mount; `options` are those of mount_options."""
    layers = [_escaped(key if value is None else f"{key}={value}") for key, value in found.layers.options]
    below = sub_path(field, mount.image_sub_path)
    asked = userns.of_mount(field, mount)
    if asked not in (None, found.ids):
        raise InvalidRequest(
            f"{field}.uidMappings: an image's files have the ids of the pod's user namespace, no others"
        )
    words = ["ro", "nosuid", "nodev", *options]
    words += ["idmap"] if found.ids else []
    words += [f"X-mount.subdir={below}"] if below else []
    return {"destination": target, "type": "overlay", "source": "overlay", "options": [*words, *layers]}


def _escaped(option: str) -> str:
    """One option of a mount is one, whatever commas its path has."""
    if "," in option or '"' in option:
        raise InvalidRequest(f"image: a layer at {option[:120]!r} cannot be named in a mount option")
    return option
