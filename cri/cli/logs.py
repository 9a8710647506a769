"""`ocid logs`: what a container wrote, from its CRI log file.

Refuses to interpret the bytes. Invariant: with --follow, the end of the container ends it, after the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from cri.api import api_pb2 as pb
from cri.cli import names
from cri.cli.connect import connect
from cri.cli.main import CommandError
from imagestore import durations

_POLL_S = 0.1  # a log file on any filesystem: inotify does not see all of them


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the container ends")
    parser.add_argument("-t", "--timestamps", action="store_true", help="print when each line was written")
    parser.add_argument("-n", "--tail", type=_count, metavar="N", help="only the last N lines (default: all)")
    parser.add_argument("--since", type=_moment, metavar="WHEN", help="only lines from then on: a time, or 10m for ago")
    parser.add_argument("--until", type=_moment, metavar="WHEN", help="only lines from before then")
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
    within = _within(args.since, args.until)
    with file:
        for line in _last(filter(within, file), args.tail):
            _print(line, args.timestamps)
        running = args.follow
        while running:
            # Asked anew each time: without a daemon the root belongs to others in between.
            running = await _is_running(args, container.id)
            for line in filter(within, _whole_lines(file)):
                _print(line, args.timestamps)
            sys.stdout.flush()
            if running:
                await asyncio.sleep(_POLL_S)
    return 0


def _count(text: str) -> int | None:
    """A number of lines; None for all, as with docker."""
    if text == "all":
        return None
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of lines nor all")
    return int(text)


def _moment(text: str) -> bytes:
    """A time of RFC 3339, seconds since 1970, or how long ago such as 1h30m; as log lines have it."""
    if (ago := durations.seconds(text)) is not None:
        when = time.time() - ago
    elif re.fullmatch(r"\d{1,11}(\.\d+)?", text, re.ASCII):
        when = float(text)
    else:
        try:
            read = datetime.datetime.fromisoformat(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no time such as 2026-11-27T15:04:05Z or 10m") from None
        when = (read if read.tzinfo else read.astimezone()).timestamp()
    return datetime.datetime.fromtimestamp(when, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f").encode()


def _within(since: bytes | None, until: bytes | None) -> Callable[[bytes], bool]:
    return lambda line: (since is None or line >= since) and (until is None or line < until)


def _last(lines: Iterable[bytes], count: int | None) -> Iterable[bytes]:
    """The last `count` lines, whatever pieces they are in; all for None."""
    if count is None:
        return lines
    kept: deque[list[bytes]] = deque([[]], count + 1)
    for line in lines:
        kept[-1].append(line)
        if line.split(b" ", 3)[2:3] != [b"P"]:
            kept.append([])
    if kept[-1]:  # a line that goes on
        kept.popleft() if len(kept) > count else None
    return [line for whole in kept for line in whole]


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
