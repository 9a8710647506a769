"""`ocid images`: what is in the store."""

from __future__ import annotations

import argparse
import asyncio

from cri.api import api_pb2 as pb
from cri.cli import output
from cri.cli.connect import connect
from imagestore.artifacts import ARTIFACT_TYPE


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="only the ids")
    output.format_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        listed = (await api.call("ListImages", pb.ListImagesRequest())).images
    if args.quiet:
        for image in listed:
            print(image.id)
    elif args.format == "json":
        output.as_json(
            [
                {
                    "id": image.id,
                    "tags": list(image.repo_tags),
                    "digests": list(image.repo_digests),
                    "size": image.size,
                    "pinned": image.pinned,
                    "artifact": image.spec.annotations.get(ARTIFACT_TYPE, ""),
                }
                for image in listed
            ]
        )
    else:
        rows = [
            (name, image.id.removeprefix("sha256:")[:12], output.size(image.size))
            for image in listed
            for name in (list(image.repo_tags) or list(image.repo_digests)[:1] or ["-"])
        ]
        output.table(("IMAGE", "ID", "SIZE"), sorted(rows))
    return 0
