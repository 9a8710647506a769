"""`ocid load`: images of an archive (what docker save, podman save or skopeo write) or of an OCI layout into the store.

Refuses nothing that the image store takes; what is compressed is decompressed first, up to the largest image allowed.
Invariant: a line for each image that was loaded, with its name.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cri.api import api_pb2 as pb
from cri.cli.connect import Api, configuration, connect
from cri.cli.main import CommandError
from cri.cli.pull import given_keys, pull
from imagestore.copying.archives import ArchiveImages, images_in, plain_copy
from imagestore.copying.places import Place
from imagestore.model import ImageError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input", metavar="FILE", help="the archive, or a layout's directory (default: stdin)")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the ids")


def run(args: argparse.Namespace) -> int:
    if args.input is None and sys.stdin.isatty():
        raise CommandError("an archive is expected on stdin, or with -i FILE")
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    limit = configuration(args).image.image_bytes
    try:
        with _file(args.input, limit) as path:
            found = images_in(path)
            async with connect(args) as api:
                for tag in found.names or ("",):
                    answer = await api.own("Load", _request(found, path, tag, ""))
                    for line in [answer["id"]] if args.quiet else [f"{answer['id']}  {' '.join(answer['names'])}"]:
                        print(line)
    except ImageError as error:
        raise CommandError(str(error)) from None
    return 0


@contextlib.contextmanager
def _file(name: str | None, limit: int) -> Iterator[Path]:
    """The archive as a file that is not compressed."""
    with contextlib.ExitStack() as held:
        if name is not None and Path(name).is_dir():
            yield Path(name).absolute()
            return
        source = held.enter_context(open(name, "rb")) if name is not None else sys.stdin.buffer
        with tempfile.NamedTemporaryFile(prefix="ocid-load-", suffix=".tar", dir=_spacious()) as file:
            plain = plain_copy(source, file, limit) or name is None
            yield Path(file.name if plain else os.path.abspath(str(name)))


def _spacious() -> str:
    # /tmp may be memory; images are not small.
    return os.environ.get("TMPDIR") or "/var/tmp"


def _request(found: ArchiveImages, path: Path, tag: str, name: str) -> dict[str, str]:
    return {"kind": found.kind, "path": str(path), "tag": tag, "name": name}


async def into_store(args: argparse.Namespace, source: Place, name: str) -> str:
    """What `ocid copy SOURCE ocid:NAME` does; the digest of the image's manifest."""
    if args.encryption_key:
        raise CommandError("--encryption-key: what is in the store is as it came; copy it from there to elsewhere")
    if args.decryption_key and source.kind != "docker":
        raise CommandError("--decryption-key: from files the store takes layers that the node's own keys open")
    async with connect(args) as api:
        if source.kind in ("docker", "ocid"):
            image = source.name
            if source.kind == "docker":
                image = await pull(api, source.name, creds=args.src_creds, keys=given_keys(args))
            if name:
                await api.own("Tag", {"name": image, "new": name})
        elif source.kind in ("oci", "oci-archive", "docker-archive"):
            request = {"kind": source.kind, "path": str(source.path.absolute()), "tag": source.name, "name": name}
            image = (await api.own("Load", request))["id"]
        else:
            raise CommandError(f"{source}: the store takes docker://, oci:, oci-archive: and docker-archive:")
        return await _digest(api, image)


async def _digest(api: Api, image: str) -> str:
    import json

    answer = await api.call("ImageStatus", pb.ImageStatusRequest(image=pb.ImageSpec(image=image), verbose=True))
    if not answer.HasField("image"):
        raise CommandError(f"image {image} was removed meanwhile")
    return str(json.loads(answer.info["info"])["manifestDigest"])
