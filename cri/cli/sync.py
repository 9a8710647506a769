"""`ocid sync`: all images of a repository, of a directory or of a list, to a registry or into a directory.

    ocid sync --src docker --dest dir localhost:5000/app /media/usb         /media/usb/app:1, /media/usb/app:2, …
    ocid sync --src dir --dest docker /media/usb registry.example.com/lib   registry.example.com/lib/app:1, …
    ocid sync --src yaml --dest docker LIST.yaml registry.example.com       what LIST.yaml names

Refuses to copy from directory to directory, and over an image that is in a directory already. Invariant: a line for
each image that was copied, with its digest; exit code 0 means all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cri.cli.copy import copy_options, side_arguments, transfer
from cri.cli.main import CommandError
from cri.cli.places import access, copying
from cri.cli.registry_options import authfile_argument, platform_argument
from cri.cli.signing_options import signature_arguments
from imagestore.model import ImageError

if TYPE_CHECKING:
    from imagestore.copying.session import Session
    from imagestore.copying.sync import Wanted


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--src", choices=("docker", "dir", "yaml"), required=True, help="what the source is")
    parser.add_argument("-d", "--dest", choices=("docker", "dir"), required=True, help="what the target is")
    parser.add_argument("--scoped", action="store_true", help="keep the images' whole names below the target")
    parser.add_argument("--keep-going", action="store_true", help="copy the others when one fails")
    parser.add_argument("--dry-run", action="store_true", help="say what would be copied, and to where")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-a", "--all", action="store_true", help="every platform of an index, and the index")
    platform_argument(which)
    side_arguments(parser)
    authfile_argument(parser)
    signature_arguments(parser)
    parser.add_argument("--insecure-policy", action="store_true", help="do not ask the signature policy of the sources")
    parser.add_argument("source", help="a reference or a repository, a directory, or a YAML file")
    parser.add_argument("target", help="a registry with a path or without, or a directory")


def run(args: argparse.Namespace) -> int:
    if args.src == args.dest == "dir":
        raise CommandError("from directory to directory: copy the files")
    args.encryption_key, args.decryption_key, args.compress, args.sign_identity = [], [], "", ""
    args.target = args.target.removeprefix("docker://").rstrip("/") if args.dest == "docker" else args.target
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    failed = 0
    async with copying(args, Path(args.target) if args.dest == "dir" and not args.dry_run else None) as session:
        for wanted in await _wanted(args, session):
            try:
                await _one(args, session, wanted)
            except ImageError as error:
                if not args.keep_going:
                    raise
                failed += 1
                print(f"ocid sync: {wanted.place}: {error}", file=sys.stderr)
    if failed:
        raise CommandError(f"{failed} image{'s were' if failed > 1 else ' was'} not copied")
    return 0


async def _wanted(args: argparse.Namespace, session: Session) -> list[Wanted]:
    from imagestore.copying.sync import Asked, directories, images_of, listed

    if args.src == "dir":
        return await session.threads.io(directories, Path(args.source))
    reached = access(args, "src_")
    if args.src == "yaml":
        asked = await session.threads.io(listed, Path(args.source), reached)
    else:
        asked = [Asked(args.source.removeprefix("docker://"), reached)]
    found: list[Wanted] = []
    for one in asked:
        try:
            found += await images_of(session, one)
        except ImageError as error:
            if not args.keep_going:
                raise
            print(f"ocid sync: {one.name}: {error}", file=sys.stderr)
    return found


async def _one(args: argparse.Namespace, session: Session, wanted: Wanted) -> None:
    target = wanted.target(args.dest, args.target, scoped=args.scoped)
    if target.kind == "dir" and (target.path / "manifest.json").exists():
        raise ImageError(f"{target}: there is an image already")
    if args.dry_run:
        print(f"{wanted.place} -> {target}")
        return
    source = await session.source(wanted.place, wanted.access)
    made = await transfer(args, session, (wanted.place, source), target, copy_options(args, session, target))
    print(f"{made.digest}  {target}")
