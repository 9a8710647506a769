"""`ocid logs`: what a container wrote, from its CRI log file.

Refuses to interpret the bytes. Invariant: with --follow, the end of the container ends it, after the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from typing import IO

from cri.api import api_pb2 as pb
from cri.cli import names
from cri.cli.connect import connect
from cri.cli.main import CommandError

_POLL_S = 0.1  # a log file on any filesystem: inotify does not see all of them


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the container ends")
    parser.add_argument("-t", "--timestamps", action="store_true", help="print when each line was written")
    parser.add_argument("-n", "--tail", type=int, metavar="N", help="only the last N lines")
    parser.add_argument("container", help="name or id")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        container = await names.find(api, args.container)
        status = (await api.call("ContainerStatus", pb.ContainerStatusRequest(container_id=container.id))).status
    if not status.log_path:
        raise CommandError(f"{args.container} has no log: it was made without a log path", 1)
    try:
        file = open(status.log_path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        if container.state != pb.CONTAINER_CREATED:
            raise CommandError(f"the log of {args.container} is gone: {status.log_path}", 1) from None
        return 0
    with file:
        lines = list(file) if args.tail is not None else None
        for line in lines[-args.tail :] if lines is not None and args.tail else (lines or []) if args.tail else file:
            _print(line, args.timestamps)
        running = args.follow
        while running:
            # Asked anew each time: without a daemon the root belongs to others in between.
            running = await _is_running(args, container.id)
            for line in _whole_lines(file):
                _print(line, args.timestamps)
            sys.stdout.flush()
            if running:
                await asyncio.sleep(_POLL_S)
    return 0


async def _is_running(args: argparse.Namespace, container_id: str) -> bool:
    async with connect(args) as api:
        listed = await api.call("ListContainers", pb.ListContainersRequest(filter=pb.ContainerFilter(id=container_id)))
    return any(one.state == pb.CONTAINER_RUNNING for one in listed.containers)


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(start)
            return
        yield line


def _print(line: bytes, timestamps: bool) -> None:
    """One line of the CRI log format: TIME STREAM TAG TEXT; tag P means that the line goes on."""
    parts = line.split(b" ", 3)
    if len(parts) != 4:
        return
    when, stream, tag, text = parts
    out = sys.stderr.buffer if stream == b"stderr" else sys.stdout.buffer
    if tag.startswith(b"P"):
        text = text.removesuffix(b"\n")
    out.write(when + b" " + text if timestamps else text)
    if stream == b"stderr":
        out.flush()
