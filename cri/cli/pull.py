"""`ocid pull`: an image into the store, verified and unpacked.

Refuses to print progress anywhere but on a terminal. Invariant: the last line is the image's id.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

from cri.api import api_pb2 as pb
from cri.cli import addresses
from cri.cli.connect import Api, connect
from cri.cli.main import CommandError
from cri.cli.registry_options import credentials, given_keys, keys_argument, packed, platform_argument
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    from imagestore.model import KeyFile


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="log in to the registry with these")
    keys_argument(parser)
    which = parser.add_mutually_exclusive_group()
    platform_argument(which)
    which.add_argument(
        "-a",
        "--all-platforms",
        action="store_true",
        help="also keep what the image's index has for other platforms, packed as it is: for save and copy",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no bars on a terminal")
    parser.add_argument("image", help="reference, such as docker.io/library/nginx:1.27 or host:5000/app@sha256:…")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        asked = Wanted(args.creds, given_keys(args), args.all_platforms, args.platform or "", args.quiet)
        print(await pull(api, args.image, asked))
    return 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What else than its name was asked for of an image: a login, keys for its layers, all platforms or another one."""

    creds: str | None = None
    keys: tuple[KeyFile, ...] = ()
    all_platforms: bool = False
    platform: str = ""
    quiet: bool = False


async def present(api: Api, image: str, when: str, wanted: Wanted, whose: str = "", never: str = "--pull never") -> str:
    """The image's id, fetched "always", when it is "missing", or "never". Raises CommandError, which begins with
    `whose` and says what forbade it by `never`."""
    if when != "always":
        status = await api.call("ImageStatus", pb.ImageStatusRequest(image=pb.ImageSpec(image=image)))
        if status.HasField("image"):
            return str(status.image.id)
        if when == "never":
            raise CommandError(f"{whose}there is no image {image!r}, and {never} forbids fetching it")
    if api.local is not None:
        addresses.random()
    if sys.stderr.isatty():
        print(f"pulling {image}", file=sys.stderr)
    return await pull(api, image, wanted)


async def pull(api: Api, image: str, wanted: Wanted) -> str:
    """Pulls and returns the image's id; shows bars on a terminal when the work is done in this process."""
    if wanted.quiet or not sys.stderr.isatty():
        return await _ask(api, image, wanted)
    if api.local is not None:
        return await _pull_with_bars(api, image, wanted)
    watching = asyncio.create_task(_watch(api))
    try:
        return await _ask(api, image, wanted)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _watch(api: Api) -> None:
    """Bars of what a daemon pulls, whoever asked for it."""
    from cri.cli.bars import bars
    from imagestore.model import Progress

    with bars() as show:
        async for step in api.pulls():
            show(Progress(step["digest"], step["phase"], step["done"], step["total"]))


async def _ask(api: Api, image: str, wanted: Wanted) -> str:
    request = pb.PullImageRequest(image=pb.ImageSpec(image=image))
    if wanted.creds:
        request.auth.username, _, request.auth.password = wanted.creds.partition(":")
    keys, everything = packed(wanted.keys), wanted.all_platforms
    answer = await api.call("PullImage", request, keys=keys, all_platforms=everything, platform=wanted.platform)
    return str(answer.image_ref)


async def _pull_with_bars(api: Api, image: str, wanted: Wanted) -> str:
    from cri.cli.bars import bars
    from imagestore.model import ImageError

    with bars() as show:
        try:
            login, everything = credentials(wanted.creds), wanted.all_platforms
            pulled = await api.local.images.pull(
                image, login, show, keys=wanted.keys, all_platforms=everything, platform=wanted.platform
            )
            return str(pulled.id)
        except ImageError as error:
            raise CommandError(str(error)) from None
