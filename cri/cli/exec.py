"""`ocid exec`: a command in a running container.

Becomes `ocirun exec` on the runtime's own state, so that terminal, signals and exit code are the runtime's business.
Refuses containers that do not run. Invariant: no daemon is between the terminal and the process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from cri.api import api_pb2 as pb
from cri.cli import names
from cri.cli.connect import connect
from cri.cli.main import FAILED, CommandError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="pass standard input on (else it is empty)")
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="K=V", help="set a variable")
    parser.add_argument("-u", "--user", metavar="UID[:GID]", help="run as these numbers")
    parser.add_argument("-w", "--workdir", metavar="DIR", help="start in this directory")
    parser.add_argument("container", help="name or id")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command and its arguments")


def run(args: argparse.Namespace) -> int:
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        raise CommandError("say what to run")
    state, container_id = asyncio.run(_find(args))
    command = [sys.executable, "-I", "-m", "runtime.cli", "--root", f"{state}/runtime", "--shell-codes", "exec"]
    command += ["--tty"] if args.tty else []
    for entry in args.env:
        command += ["--env", entry]
    command += ["--user", args.user] if args.user else []
    command += ["--cwd", args.workdir] if args.workdir else []
    if not args.interactive:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(command[0], [*command, container_id, *words])
    return 127


async def _find(args: argparse.Namespace) -> tuple[str, str]:
    async with connect(args) as api:
        container = await names.find(api, args.container, FAILED)
        if container.state != pb.CONTAINER_RUNNING:
            raise CommandError(f"{args.container} is not running")
        return str(api.config.state), container.id
