"""What commands that copy images share: options, the frame of a copy, and images of the store as a source.

Refuses nothing itself. Invariant: a failure of the image store is a CommandError with its sentence.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from cri.api import api_pb2 as pb
from cri.cli.connect import configuration, connect
from cri.cli.main import CommandError
from cri.cli.registry_options import credentials
from cri.config import Config
from cri.image_config import store_config
from imagestore.config import StoreConfig
from imagestore.copying.places import Place
from imagestore.copying.session import Access, Session, session
from imagestore.model import Credentials, ImageError
from imagestore.platforms import parse_platform


def access(args: argparse.Namespace, side: str = "") -> Access:
    """How a registry is reached, as the options of one side say ("src_", "dest_"), or those of the command."""
    own = getattr(args, f"{side}authfile", None)
    anonymous = getattr(args, f"{side}no_creds", False)
    return Access(
        Credentials() if anonymous else credentials(getattr(args, f"{side}creds", None)),
        Path(own).absolute() if own else None,
        getattr(args, f"{side}tls_verify"),
    )


def image_config(args: argparse.Namespace, config: Config) -> StoreConfig:
    """The image store's configuration with the command line over it. Raises CommandError."""
    made = store_config(config)
    try:
        if getattr(args, "platform", None):
            made = replace(made, platform=parse_platform(args.platform))
    except ImageError as error:
        raise CommandError(str(error)) from None
    if getattr(args, "authfile", None):
        made = replace(made, keyring=replace(made.keyring, files=(Path(args.authfile).absolute(),)))
    return made


@contextlib.asynccontextmanager
async def copying(args: argparse.Namespace, beside: Path | None) -> AsyncIterator[Session]:
    """The frame of a copy. Raises CommandError."""
    try:
        async with session(image_config(args, configuration(args)), beside) as made:
            yield made
    except ImageError as error:
        raise CommandError(str(error)) from None


async def stored_digest(args: argparse.Namespace, name: str, *, everything: bool = False) -> tuple[str, list[str]]:
    """The digest of the manifest of an image in the store, or with `everything` of the index, where it came from
    one; and its tags. Raises CommandError."""
    import json

    async with connect(args) as api:
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=name), verbose=True)
        answer = await api.call("ImageStatus", request)
    if not answer.HasField("image"):
        raise CommandError(f"there is no image {name!r}; see ocid images", 1)
    told = json.loads(answer.info["info"])
    digest, tags = str(told["manifestDigest"]), list(answer.image.repo_tags)
    if everything and told["indexes"]:
        return str(told["indexes"][-1]), tags
    if everything and any(not known.endswith(digest) for known in answer.image.repo_digests):
        raise CommandError(f"image {name!r} is here for this platform only; see ocid pull --all-platforms")
    return digest, tags


def store_root(args: argparse.Namespace) -> Path:
    """Where the store's layout lies."""
    return configuration(args).root / "images"


def is_store(place: Place) -> bool:
    return place.kind == "ocid"
