"""`ocid tag`: a further name for an image of the store."""

from __future__ import annotations

import argparse
import asyncio

from cri.cli.connect import connect


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="reference, digest or id")
    parser.add_argument("name", nargs="+", help="the further names; one that another image has moves")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        for name in args.name:
            await api.own("Tag", {"name": args.image, "new": name})
    return 0
