"""`ocid kill`: a signal for a container's first process; becomes `ocirun kill` on the runtime's own state.

KILL and TERM mean that it is to end, and so they end its restarts, too (`ocid run --restart`), as with docker.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

from cri.cli import names
from cri.cli.connect import connect
from cri.cli.main import CommandError
from cri.cli.names import sandbox
from cri.cli.watch import look
from cri.marks import RESTART
from runtime.commands.change import signal_number
from runtime.options import UsageError
from runtime.shim.client import Shims


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--signal", default="KILL", metavar="SIGNAL", help="name or number (default: KILL)")
    parser.add_argument("container", help="name or id")


def run(args: argparse.Namespace) -> int:
    try:
        number = signal_number(args.signal)
    except UsageError as error:
        raise CommandError(f"-s: {error}") from None
    state, container_id = asyncio.run(_find(args, ends=number in (signal.SIGKILL, signal.SIGTERM)))
    if not container_id:
        return 0
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


async def _find(args: argparse.Namespace, *, ends: bool) -> tuple[str, str]:
    """State directory and id; no id where there is nothing left to kill."""
    async with connect(args) as api:
        container = await names.find(api, args.container)
        state = api.config.state
        if not ends or not container.annotations.get(RESTART):
            return str(state), container.id
        before = await look(api, container.id)
        Shims(state, direct=api.local is not None).retire(sandbox(state, container.pod_sandbox_id), container.id)
        was_due = before == (None, 0)
        return str(state), "" if was_due else container.id
