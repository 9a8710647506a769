"""`ocid exec`: a command in a running container.

Becomes `ocirun exec` on the runtime's own state, so that terminal, signals and exit code are the runtime's business.
Refuses containers that do not run. Invariant: no daemon is between the terminal and the process.
"""

from __future__ import annotations

import argparse
import asyncio
import os

from cri.api import api_pb2 as pb
from cri.cli import names
from cri.cli.connect import connect
from cri.cli.main import FAILED, CommandError
from cri.cli.ocirun import ocirun
from cri.cli.watch import look
from runtime.linux.process import become


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="pass standard input on (else it is empty)")
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="K=V", help="set a variable")
    parser.add_argument("-d", "--detach", action="store_true", help="leave it running in there")
    parser.add_argument("-u", "--user", metavar="USER[:GROUP]", help="run as this user: numbers, or names in there")
    parser.add_argument("-w", "--workdir", metavar="DIR", help="start in this directory")
    parser.add_argument("container", help="name or id")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command and its arguments")


def run(args: argparse.Namespace) -> int:
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        raise CommandError("say what to run")
    if args.detach and (args.tty or args.interactive):
        raise CommandError("-d: nobody would be there for -i or -t: leave out one of them")
    state, container_id, pid = asyncio.run(_find(args))
    command = [*ocirun(), "--root", f"{state}/runtime", "--shell-codes", "exec"]
    command += ["--tty"] if args.tty else []
    for entry in args.env:
        command += ["--env", entry]
    command += _user(pid, args.user) if args.user else []
    command += ["--cwd", args.workdir] if args.workdir else []
    command += ["--detach"] if args.detach else []
    if not args.interactive:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2) if args.detach else ():
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    become(command[0], [*command, container_id, *words])  # gRPC's threads are still there


def _user(pid: int, text: str) -> list[str]:
    """The options for this user; names are what passwd and group inside of the container make of them."""
    if all(part.isascii() and part.isdecimal() for part in text.split(":")):
        return ["--user", text]
    from cri.spec import users
    from cri.spec.validate import InvalidRequest

    def database() -> users.Database:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return users.database_in(root)
        finally:
            os.close(root)

    try:
        user = users.resolve(users.UserRequest(image_user=text), database)
    except (InvalidRequest, OSError) as error:
        raise CommandError(f"-u: {error}") from None
    more = [word for group in user.groups for word in ("--additional-gids", str(group))]
    return ["--user", f"{user.uid}:{user.gid}", *more]


async def _find(args: argparse.Namespace) -> tuple[str, str, int]:
    async with connect(args) as api:
        container = await names.find(api, args.container, FAILED)
        if container.state != pb.CONTAINER_RUNNING:
            raise CommandError(f"{args.container} is not running")
        pid = (await look(api, container.id))[1] if args.user else 0
        return str(api.config.state), container.id, pid
