"""`ocid wait`: until the containers have exited; prints their exit codes.

Invariant: nothing is held while it waits: without a daemon the root belongs to others in between.
"""

from __future__ import annotations

import argparse
import asyncio

from cri.api import api_pb2 as pb
from cri.cli import names
from cri.cli.connect import connect
from cri.cli.main import CommandError
from cri.cli.watch import look, wait_pid


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", nargs="+", help="name or id")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async def one(wanted: str) -> None:
        async with connect(args) as api:
            container = await names.find(api, wanted)
        if container.state == pb.CONTAINER_CREATED:
            raise CommandError(f"{wanted} was never started", 1)
        while True:
            async with connect(args) as api:
                code, pid = await look(api, container.id)
            if code is not None:
                break
            await wait_pid(pid)
        print(code, flush=True)

    return await names.each(args, args.container, one)
