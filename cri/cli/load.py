"""`ocid load`: images of an archive (what docker save, podman save or skopeo write) or of an OCI layout into the store.

The daemon is handed what is open here, so it need not be able to open it. Refuses nothing that the image store takes;
what is compressed is decompressed first, up to the largest image allowed. Invariant: a line for each image that was
loaded, with its name.
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
from typing import BinaryIO

from cri.api import api_pb2 as pb
from cri.cli import addresses
from cri.cli.connect import Api, configuration, connect
from cri.cli.main import CommandError
from cri.cli.pull import Wanted, pull
from cri.cli.registry_options import given_keys
from imagestore.content import errno_text
from imagestore.copying.archives import images_in, plain_copy
from imagestore.copying.places import Place
from imagestore.model import ImageError

# What an archive from a pipe is called in messages, names and policies.
_STDIN = Path("/stdin")


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
        with _opened(args.input, limit) as (path, fd):
            found = images_in(path, fd)
            async with connect(args) as api:
                for tag in found.names or ("",):
                    answer = await api.load(fd, {"kind": found.kind, "path": str(path), "tag": tag, "name": ""})
                    for line in [answer["id"]] if args.quiet else [f"{answer['id']}  {' '.join(answer['names'])}"]:
                        print(line)
    except ImageError as error:
        raise CommandError(str(error)) from None
    return 0


@contextlib.contextmanager
def _opened(name: str | None, limit: int) -> Iterator[tuple[Path, int]]:
    """What the archive or the layout is called, and an fd of it without its compression."""
    if name is not None and Path(name).is_dir():
        with opened(Path(name)) as fd:
            yield Path(name).absolute(), fd
        return
    with contextlib.ExitStack() as held:
        source = held.enter_context(_reader(name)) if name is not None else sys.stdin.buffer
        path = Path(name).absolute() if name is not None else _STDIN
        with tempfile.TemporaryFile(dir=_spacious()) as file:  # without a name: nothing is left, whatever happens
            yield path, (file if plain_copy(source, file, limit) else source).fileno()


def _reader(name: str) -> BinaryIO:
    try:
        return open(name, "rb")
    except OSError as error:
        raise CommandError(f"open {name}: {errno_text(error)}") from None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file or a directory, opened. Raises CommandError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise CommandError(f"open {path}: {errno_text(error)}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _spacious() -> str:
    # /tmp may be memory; images are not small.
    return os.environ.get("TMPDIR") or "/var/tmp"


async def load(api: Api, kind: str, path: Path, tag: str, name: str) -> str:
    """The id of an image of a file or a directory, once it is in the store."""
    if api.local is not None:
        addresses.random()
    with opened(path) as fd:
        request = {"kind": kind, "path": str(path.absolute()), "tag": tag, "name": name}
        return str((await api.load(fd, request))["id"])


async def into_store(args: argparse.Namespace, source: Place, name: str) -> str:
    """What `ocid copy SOURCE ocid:NAME` does; the digest of the image's manifest."""
    if args.encryption_key:
        raise CommandError("--encryption-key: what is in the store is as it came; copy it from there to elsewhere")
    if args.remove_signatures or args.sign_by_sigstore_private_key:
        raise CommandError("--remove-signatures, --sign-by-…: the store keeps what its policy asks for; see ocid sign")
    if args.decryption_key and source.kind != "docker":
        raise CommandError("--decryption-key: from files the store takes layers that the node's own keys open")
    if args.platform and source.kind != "docker":
        raise CommandError("--platform: the store takes another platform's image from a registry only")
    if args.src_authfile or args.src_no_creds or not args.src_tls_verify:
        raise CommandError(
            "--src-authfile, --src-no-creds, --src-tls-verify: the store has its own configuration of these"
        )
    asked = Wanted(args.src_creds, given_keys(args), args.all, args.platform or "")
    async with connect(args) as api:
        if source.kind in ("docker", "ocid"):
            image = source.name
            if source.kind == "docker":
                image = await pull(api, source.name, asked)
            if name:
                await api.own("Tag", {"name": image, "new": name})
        elif source.kind in ("oci", "oci-archive", "docker-archive"):
            image = await load(api, source.kind, source.path, source.name, name)
        else:
            raise CommandError(f"{source}: the store takes docker://, oci:, oci-archive: and docker-archive:")
        return await _digest(api, image)


async def _digest(api: Api, image: str) -> str:
    import json

    answer = await api.call("ImageStatus", pb.ImageStatusRequest(image=pb.ImageSpec(image=image), verbose=True))
    if not answer.HasField("image"):
        raise CommandError(f"image {image} was removed meanwhile")
    return str(json.loads(answer.info["info"])["manifestDigest"])
