"""`ocid save`: images of the store as an archive that `docker load`, `podman load`, skopeo and `ocid load` read.

Refuses to write an archive to a terminal. Invariant: FILE is there when all of it is.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from pathlib import Path

from cri.cli.bars import bars
from cri.cli.main import CommandError
from cri.cli.places import copying, store_root, stored_digest
from imagestore.copying.copy import CopyOptions
from imagestore.copying.docker_archive import DockerArchiveTarget
from imagestore.copying.places import Place
from imagestore.model import ReferenceInvalid
from imagestore.reference import parse

KINDS = ("docker-archive", "oci-archive")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="where to (default: stdout)")
    parser.add_argument("--format", choices=KINDS, default=KINDS[0], help=f"default: {KINDS[0]}")
    parser.add_argument(
        "-a", "--all-platforms", action="store_true", help="all that was pulled with --all-platforms; in an oci-archive"
    )
    parser.add_argument("image", nargs="+", help="reference, digest or id; oci-archive takes one")


def run(args: argparse.Namespace) -> int:
    if args.output is None and sys.stdout.isatty():
        raise CommandError("an archive is not for a terminal: redirect it, or say -o FILE")
    if args.format == "oci-archive" and len(args.image) > 1:
        raise CommandError("an oci-archive is for one image; docker-archive takes several")
    if args.all_platforms and args.format != "oci-archive":
        raise CommandError("a docker-archive holds one platform; say --format oci-archive")
    asyncio.run(_save(args))
    return 0


async def _save(args: argparse.Namespace) -> None:
    images = [(name, *await stored_digest(args, name, everything=args.all_platforms)) for name in args.image]
    name = _called(images[0][0], images[0][2])
    called = (name[0] if name else "") if args.format == "oci-archive" else ""
    output = Path(args.output) if args.output is not None else None
    async with copying(args, output.absolute().parent if output is not None else None) as session:
        file = output or session.scratch / "archive"
        place = Place(args.format, file, called)
        target = await session.target(place, Place("ocid", Path(), args.image[0]))
        with bars() as show:
            for asked, digest, tags in images:
                if isinstance(target, DockerArchiveTarget):
                    target.called(_called(asked, tags))
                source = session.stored(store_root(args), digest)
                await session.copy(source, target, CopyOptions(session.config.platform, all=args.all_platforms), show)
        await target.finish()
        if output is None:
            with open(file, "rb") as made:
                shutil.copyfileobj(made, sys.stdout.buffer, 1 << 20)


def _called(asked: str, tags: list[str]) -> tuple[str, ...]:
    """The tag that was asked for; all of the image's when it was asked for by its id or a digest."""
    try:
        wanted = str(parse(asked))
    except ReferenceInvalid:
        wanted = ""
    return (wanted,) if wanted in tags else tuple(tags)
