"""`ocid rmi`: takes names, and with the last name the image, out of the store."""

from __future__ import annotations

import argparse
import asyncio

from cri.api import api_pb2 as pb
from cri.cli.connect import connect
from cri.cli.main import CommandError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="reference, digest or id")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        for name in args.image:
            spec = pb.ImageSpec(image=name)
            status = await api.call("ImageStatus", pb.ImageStatusRequest(image=spec))
            if not status.HasField("image"):
                raise CommandError(f"there is no image {name!r}; see ocid images", 1)
            used = await api.call("ListContainers", pb.ListContainersRequest())
            holders = [c.id[:12] for c in used.containers if c.image_ref == status.image.id]
            if holders:
                raise CommandError(f"{name} is used by {', '.join(holders)}; remove them first (ocid rm)", 1)
            await api.call("RemoveImage", pb.RemoveImageRequest(image=spec))
            print(name)
    return 0
