"""`ocid inspect`: a container's or an image's status with all its details, as JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from cri.api import api_pb2 as pb
from cri.cli import names, output
from cri.cli.connect import connect
from cri.cli.main import CommandError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="+", help="container name or id, or image reference")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    from google.protobuf.json_format import MessageToDict

    found = []
    async with connect(args) as api:
        for wanted in args.name:
            response: Any
            try:
                container = await names.find(api, wanted)
                request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
                response = await api.call("ContainerStatus", request)
                status = response.status
            except CommandError as error:
                image = pb.ImageStatusRequest(image=pb.ImageSpec(image=wanted), verbose=True)
                response = await api.call("ImageStatus", image)
                if not response.HasField("image"):
                    raise CommandError(f"there is neither a container nor an image {wanted!r}", 1) from error
                status = response.image
            info = {key: _decoded(value) for key, value in response.info.items()}
            found.append({"status": MessageToDict(status), **info})
    output.as_json(found)
    return 0


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
