"""The image service: ListImages, ImageStatus, PullImage, RemoveImage, ImageFsInfo.

Refuses to log credentials. Invariant: an image that is listed is whole, and what the caller gets back from a pull is
its id.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from cri import trace
from cri.api import api_pb2 as pb
from cri.errors import InvalidArgument
from cri.node import Node
from cri.threads import to_thread
from imagestore.artifacts import ARTIFACT_TYPE
from imagestore.model import Credentials, Image, KeyFile, ReferenceInvalid
from imagestore.reference import DEFAULT_TAG, parse
from runtime.linux.failpoint import failpoint

log = logging.getLogger(__name__)

MAX_AUTH = 1 << 20


def message(image: Image) -> pb.Image:
    """An image in the CRI's words. `uid` is set for a numeric USER, `username` for a name."""
    answer = pb.Image(
        id=image.id, repo_tags=image.repo_tags, repo_digests=image.repo_digests, size=image.size, pinned=image.pinned
    )
    answer.spec.image = image.id
    if image.artifact:
        answer.spec.annotations[ARTIFACT_TYPE] = image.artifact
    user = image.config.user.partition(":")[0]
    if user.isascii() and user.isdecimal() and len(user) < 19:
        answer.uid.value = int(user)
    elif user:
        answer.username = user
    return answer


async def list_images(node: Node, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
    """All images, the one that the filter names, or those of the repository that it names."""
    return pb.ListImagesResponse(images=map(message, await find(node, request.filter)))


async def find(node: Node, wanted: pb.ImageFilter) -> Sequence[Image]:
    """The images that a list of `wanted` holds."""
    if not wanted.image.image:
        return await to_thread(node.parts.images.list)
    if repository := _repository(wanted.image.image):
        mine = (f"{repository}:", f"{repository}@")
        images = await to_thread(node.parts.images.list)
        if found := [one for one in images if any(it.startswith(mine) for it in (*one.repo_tags, *one.repo_digests))]:
            return found
    image = await to_thread(node.parts.images.get, wanted.image.image)
    return [] if image is None else [image]


def _repository(name: str) -> str:
    """In full, where the name is that of a repository and says neither tag nor digest; else ""."""
    try:
        return parse(f"{name}:{DEFAULT_TAG}").repository
    except ReferenceInvalid:
        return ""


async def image_status(node: Node, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
    """One image; an answer without one when it is not here."""
    name = _name(request.image)
    image = await to_thread(node.parts.images.get, name)
    if image is None:
        return pb.ImageStatusResponse()
    response = pb.ImageStatusResponse(image=message(image))
    if request.verbose:
        config = image.config
        response.info["info"] = json.dumps(
            {
                "chainID": image.chain_id if image.layers else "",
                "manifestDigest": image.manifest_digest,
                "artifactType": image.artifact,
                "indexes": image.indexes,
                "layers": [layer.blob.digest for layer in image.layers],
                "imageSpec": {
                    "created": config.created,
                    "architecture": config.architecture,
                    "os": config.os,
                    "variant": config.variant,
                    "config": {
                        "User": config.user,
                        "Env": config.env,
                        "Entrypoint": config.entrypoint,
                        "Cmd": config.cmd,
                        "WorkingDir": config.working_dir,
                        "StopSignal": config.stop_signal,
                        "Volumes": config.volumes,
                        "ExposedPorts": config.exposed_ports,
                        "Labels": dict(config.labels),
                    },
                },
            }
        )
    return response


async def pull_image(
    node: Node,
    request: pb.PullImageRequest,
    keys: tuple[KeyFile, ...] = (),
    *,
    all_platforms: bool = False,
    platform: str = "",
) -> pb.PullImageResponse:
    """Pulls; cancelling it cancels this caller's part in the pull."""
    name = _name(request.image)
    if request.image.runtime_handler:
        node.handler(request.image.runtime_handler)  # all of them have the same images, if they are there at all
    failpoint("pull_image.begun")
    started = time.monotonic()
    login = credentials(request.auth) if request.HasField("auth") else None
    with trace.pull_watched() as progress:
        namespace = request.sandbox_config.metadata.namespace
        image = await node.parts.images.pull(
            name, login, progress, namespace, keys, all_platforms=all_platforms, platform=platform
        )
    log.info("image %s is here as %s, after %.1f s", name, image.id, time.monotonic() - started)
    return pb.PullImageResponse(image_ref=image.id)


def credentials(auth: pb.AuthConfig) -> Credentials | None:
    """What to log in with; `auth` is base64 of user:password, as docker's configuration has it."""
    username, password = auth.username, auth.password
    if auth.auth and not username:
        try:
            if len(auth.auth) > MAX_AUTH:
                raise ValueError
            username, colon, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (ValueError, binascii.Error):
            raise InvalidArgument("auth.auth: not base64 of user:password") from None
        if not colon:
            raise InvalidArgument("auth.auth: not base64 of user:password")
        password = password.strip("\0")
    if not (username or password or auth.identity_token or auth.registry_token):
        return None
    return Credentials(username, password, auth.identity_token, auth.registry_token, auth.server_address)


async def remove_image(node: Node, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
    """Removes the image with all of its names, whichever of them is given, as the CRI says since 1.36. Its space comes
    back soon after. `ocid rmi` takes one name alone away (cri/own)."""
    name = _name(request.image)
    await node.tasks.finish(_remove(node, name), f"remove image {name}")
    return pb.RemoveImageResponse()


async def _remove(node: Node, name: str) -> None:
    image = await to_thread(node.parts.images.get, name)
    if image is None:
        return
    await to_thread(node.parts.images.remove, image.id)
    failpoint("remove_image.removed")
    log.info("image %s is removed, asked for as %s", image.id, name)
    node.tasks.spawn(_collect(node), "collect garbage")


async def _collect(node: Node) -> None:
    try:
        await to_thread(node.parts.images.collect)
    except Exception as error:
        log.warning("collecting what no image needs: %s", error)


async def image_fs_info(node: Node, request: pb.ImageFsInfoRequest) -> pb.ImageFsInfoResponse:
    """Space of images with their layers, and of what containers have written, as last measured. Both are on the root's
    filesystem, and a kubelet knows that by one mount point; two tell it that somebody has split them."""
    usage, (images, containers) = await asyncio.gather(
        to_thread(node.parts.images.usage), to_thread(mount_points, node.config.root)
    )
    response, now = pb.ImageFsInfoResponse(), time.time_ns()
    filesystem = response.image_filesystems.add(timestamp=now)
    filesystem.fs_id.mountpoint = images
    filesystem.used_bytes.value = usage.bytes
    filesystem.inodes_used.value = usage.inodes
    written = [node.statistics.layer(id_) for id_ in list(node.store.containers)]
    filesystem = response.container_filesystems.add(timestamp=now)
    filesystem.fs_id.mountpoint = containers
    filesystem.used_bytes.value = sum(layer.used_bytes.value for layer in written)
    filesystem.inodes_used.value = sum(layer.inodes_used.value for layer in written)
    return response


def mount_points(root: Path) -> tuple[str, str]:
    """Of images and of containers' files: the root, unless their directories are on two filesystems."""
    images, containers = root / "images", root / "snapshots"
    try:
        if images.stat().st_dev != containers.stat().st_dev:
            return str(images), str(containers)
    except FileNotFoundError:  # nothing has been pulled yet
        pass
    return str(root), str(root)


def _name(image: pb.ImageSpec) -> str:
    if not image.image:
        raise InvalidArgument("image: the name is empty")
    if len(image.image) > 4096:
        raise InvalidArgument("image: the name is longer than 4096 bytes")
    return image.image
