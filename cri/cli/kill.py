"""`ocid kill`: a signal for the first process of each container, by `ocirun kill` on the runtime's own state.

KILL and TERM mean that it is to end, and so they end its restarts, too (`ocid run --restart`), as with docker.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess

from cri.cli import names
from cri.cli.connect import connect
from cri.cli.main import CommandError
from cri.cli.names import sandbox
from cri.cli.ocirun import ocirun
from cri.cli.watch import look
from cri.marks import RESTART
from runtime.commands.change import signal_number
from runtime.options import UsageError
from runtime.shim.client import Shims


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--signal", default="KILL", metavar="SIGNAL", help="name or number (default: KILL)")
    parser.add_argument("container", nargs="+", help="name or id")


def run(args: argparse.Namespace) -> int:
    try:
        number = signal_number(args.signal)
    except UsageError as error:
        raise CommandError(f"-s: {error}") from None
    ends = number in (signal.SIGKILL, signal.SIGTERM)

    async def one(wanted: str) -> None:
        state, container_id = await _find(args, wanted, ends=ends)
        if container_id:
            _signal(state, container_id, args.signal)

    return asyncio.run(names.each(args, args.container, one))


def _signal(state: str, container_id: str, name: str) -> None:
    command = [*ocirun(), "--root", f"{state}/runtime", "kill", container_id, name]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CommandError(done.stderr.strip().removeprefix("ocirun kill: "), done.returncode)


async def _find(args: argparse.Namespace, wanted: str, *, ends: bool) -> tuple[str, str]:
    """State directory and id; no id where there is nothing left to kill."""
    async with connect(args) as api:
        container = await names.find(api, wanted)
        state = api.config.state
        if not ends or not container.annotations.get(RESTART):
            return str(state), container.id
        before = await look(api, container.id)
        Shims(state, direct=api.local is not None).retire(sandbox(state, container.pod_sandbox_id), container.id)
        was_due = before == (None, 0)
        return str(state), "" if was_due else container.id
