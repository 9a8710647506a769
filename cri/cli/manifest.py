"""`ocid manifest`: what a registry, a layout or an archive has under a name, without pulling it.

    inspect REF     the manifest or the index itself, byte by byte as it is served
    digest REF      its digest
    config REF      the image's config, byte by byte
    referrers REF   what refers to it: signatures, attestations, bills of materials
    tags NAME       all tags of the repository
    delete REF      takes the manifest out of the registry, with every tag that it has there

Refuses to delete but from a registry. Invariant: nothing is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from cri.cli import output
from cri.cli.main import CommandError
from cri.cli.places import access, copying
from cri.cli.registry_options import authfile_argument, platform_argument, tls_argument
from imagestore.copying.places import KINDS, Place, parse_place
from imagestore.copying.session import Session
from imagestore.model import ReferenceInvalid


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("inspect", "digest", "config", "referrers", "tags", "delete"))
    parser.add_argument("image", help="a reference, or docker://…, oci:…, oci-archive:…, docker-archive:…, dir:…")
    platform_argument(parser)
    parser.add_argument("--type", default="", help="with referrers: only of this artifact type")
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="log in to the registry with these")
    authfile_argument(parser)
    tls_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


def place_of(text: str) -> Place:
    """A bare reference is one of a registry. Raises CommandError."""
    try:
        kind = text.partition(":")[0]
        return parse_place(text if kind in KINDS and ":" in text else f"docker://{text}")
    except ReferenceInvalid as error:
        raise CommandError(str(error)) from None


async def _run(args: argparse.Namespace) -> int:
    place = place_of(args.image)
    if place.kind != "docker" and args.action in ("referrers", "tags", "delete"):
        raise CommandError(f"{place}: {args.action} is for images in a registry")
    async with copying(args, None) as session:
        if args.action in ("inspect", "digest", "config"):
            await _print(args, session, place)
        elif args.action == "tags":
            await _tags(args, session, place)
        else:
            await _about(args, session, place)
    return 0


async def _print(args: argparse.Namespace, session: Session, place: Place) -> None:
    from imagestore.copying.inspect import config_of
    from imagestore.resolve import resolve

    source = await session.source(place, access(args))
    if args.action == "config":
        data = await config_of(source, session.scratch, session.threads, session.config)
    else:
        document = await source.top()
        if args.platform:
            document, _ = await resolve(source, document, session.threads, session.config)
        if args.action == "digest":
            print(document.digest)
            return
        data = document.data
    sys.stdout.buffer.write(data)
    if not data.endswith(b"\n") and sys.stdout.isatty():
        print()


async def _tags(args: argparse.Namespace, session: Session, place: Place) -> None:
    from imagestore.copying.inspect import tags
    from imagestore.reference import parse

    repository = await session.repository(place, access(args), "pull")
    output.as_json({"Repository": parse(place.name).repository, "Tags": await tags(repository, session.config)})


async def _about(args: argparse.Namespace, session: Session, place: Place) -> None:
    """What needs the digest that the name has now."""
    from imagestore.copying.inspect import referrers

    digest = (await (await session.source(place, access(args))).top()).digest
    if args.action == "delete":
        # "*" is what a registry's token server wants to hear for it.
        await (await session.repository(place, access(args), "*")).delete(digest)
        print(digest)
        return
    repository = await session.repository(place, access(args), "pull")
    output.as_json(await referrers(repository, digest, args.type, session.config))
