"""`ocid rmi`: takes names, and with the last name the image, out of the store."""

from __future__ import annotations

import argparse
import asyncio

from cri.api import api_pb2 as pb
from cri.cli import names
from cri.cli.connect import Api, connect
from cri.cli.main import CommandError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--force", action="store_true", help="also one that containers use; none of that name is no failure"
    )
    parser.add_argument("image", nargs="+", help="reference, digest or id")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:

        async def one(name: str) -> None:
            spec = pb.ImageSpec(image=name)
            status = await api.call("ImageStatus", pb.ImageStatusRequest(image=spec))
            if not status.HasField("image"):
                if args.force:
                    return
                raise CommandError(f"there is no image {name!r}; see ocid images", 1)
            # The digest that an image came by keeps nothing that anybody asked for: the last tag takes it along.
            if len(status.image.repo_tags) > 1 and not _is_id(name, status.image.id):
                await api.own("Untag", {"name": name})
            else:
                if not args.force:
                    await _refuse_used(api, name, status.image.id)
                await api.call("RemoveImage", pb.RemoveImageRequest(image=spec))
            print(name)

        return await names.each(args, args.image, one)


async def _refuse_used(api: Api, name: str, id_: str) -> None:
    used = await api.call("ListContainers", pb.ListContainersRequest())
    holders = [c.id[:12] for c in used.containers if c.image_id == id_]
    if holders:
        raise CommandError(f"{name} is used by {', '.join(holders)}; remove them first (ocid rm)", 1)


def _is_id(name: str, id_: str) -> bool:
    return id_.removeprefix("sha256:").startswith(name.removeprefix("sha256:"))
