"""`ocid manifest`: what a registry, a layout or an archive has under a name, without pulling it.

    inspect REF     the manifest or the index itself, byte by byte as it is served
    referrers REF   what refers to it: signatures, attestations, bills of materials

Invariant: nothing is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from cri.cli import output
from cri.cli.main import CommandError
from cri.cli.places import authfile_argument, copying
from cri.cli.pull import credentials, platform_argument
from imagestore.copying.places import KINDS, Place, parse_place
from imagestore.model import ImageError, ReferenceInvalid


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("inspect", "referrers"))
    parser.add_argument("image", help="a reference, or docker://…, oci:…, oci-archive:…, docker-archive:…, dir:…")
    platform_argument(parser)
    parser.add_argument("--type", default="", help="with referrers: only of this artifact type")
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="log in to the registry with these")
    authfile_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_inspect(args) if args.action == "inspect" else _referrers(args))


def place_of(text: str) -> Place:
    """A bare reference is one of a registry. Raises CommandError."""
    try:
        kind = text.partition(":")[0]
        return parse_place(text if kind in KINDS and ":" in text else f"docker://{text}")
    except ReferenceInvalid as error:
        raise CommandError(str(error)) from None


async def _inspect(args: argparse.Namespace) -> int:
    from imagestore.resolve import resolve

    async with copying(args, None) as session:
        source = await session.source(place_of(args.image), credentials(args.creds))
        document = await source.top()
        if args.platform:
            document, _ = await resolve(source, document, session.threads, session.config)
    sys.stdout.buffer.write(document.data)
    if not document.data.endswith(b"\n") and sys.stdout.isatty():
        print()
    return 0


async def _referrers(args: argparse.Namespace) -> int:
    from imagestore.copying.inspect import referrers

    place = place_of(args.image)
    if place.kind != "docker":
        raise CommandError(f"{place}: only a registry knows what refers to an image")
    async with copying(args, None) as session:
        source = await session.source(place, credentials(args.creds))
        digest = (await source.top()).digest
        repository = await session.repository(place, credentials(args.creds), "pull")
        try:
            found = await referrers(repository, digest, args.type, session.config)
        except ImageError as error:
            raise CommandError(str(error)) from None
    output.as_json([json.loads(json.dumps(item)) for item in found])
    return 0
