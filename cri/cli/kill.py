"""`ocid kill`: a signal for a container's first process; becomes `ocirun kill` on the runtime's own state."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from cri.cli import names
from cri.cli.connect import connect
from cri.cli.main import CommandError
from runtime.commands.change import signal_number
from runtime.options import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--signal", default="KILL", metavar="SIGNAL", help="name or number (default: KILL)")
    parser.add_argument("container", help="name or id")


def run(args: argparse.Namespace) -> int:
    try:
        signal_number(args.signal)
    except UsageError as error:
        raise CommandError(f"-s: {error}") from None
    state, container_id = asyncio.run(_find(args))
    command = [
        sys.executable,
        "-I",
        "-m",
        "runtime.cli",
        "--root",
        f"{state}/runtime",
        "kill",
        container_id,
        args.signal,
    ]
    os.execv(command[0], command)
    return 127


async def _find(args: argparse.Namespace) -> tuple[str, str]:
    async with connect(args) as api:
        container = await names.find(api, args.container)
        return str(api.config.state), container.id
