"""`ocid stop`: the image's stop signal, a grace period, then SIGKILL for what is left."""

from __future__ import annotations

import argparse
import asyncio

from cri.api import api_pb2 as pb
from cri.cli import names
from cri.cli.connect import connect


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-t", "--time", type=int, default=10, metavar="SECONDS", help="grace period (default: 10)")
    parser.add_argument("container", nargs="+", help="name or id")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:

        async def one(wanted: str) -> None:
            container = await names.find(api, wanted)
            await api.call("StopContainer", pb.StopContainerRequest(container_id=container.id, timeout=args.time))
            if names.is_ours(container):
                await api.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=container.pod_sandbox_id))
            print(wanted)

        return await names.each(args, args.container, one)
