"""`ocid wait`: until the containers have exited; prints their exit codes."""

from __future__ import annotations

import argparse
import asyncio

from cri.api import api_pb2 as pb
from cri.cli import names
from cri.cli.connect import connect
from cri.cli.watch import wait_exit


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", nargs="+", help="name or id")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        for wanted in args.container:
            container = await names.find(api, wanted)
            if container.state == pb.CONTAINER_CREATED:
                print(f"{wanted} was never started")
                return 1
            print(await wait_exit(api, container.id))
    return 0
