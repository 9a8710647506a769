"""`ocid doctor`: verifies every blob, unpacked layer and record of the images; with --repair fetches what is damaged
again from where it came. The exit code is 0 when nothing is wrong (any more), else 1."""

from __future__ import annotations

import argparse
import asyncio

from cri.cli import output
from cri.cli.connect import connect


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="throw away what is damaged and fetch it again")
    output.format_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        answer = await api.own("Check", {"repair": args.repair})
    problems, left = answer["problems"], answer["left"]
    if args.format == "json":
        output.as_json({"problems": problems, "left": left})
    else:
        if problems:  # what several images need is wrong for each of them, and told once
            rows = dict.fromkeys((one["kind"], one["name"], one["what"]) for one in problems)
            output.table(("KIND", "NAME", "WHAT"), list(rows))
        if args.repair and problems:
            print("repaired" if not left else "still wrong:")
            for one in left:
                print(f"  {one['kind']} {one['name']}: {one['what']}")
        elif not problems:
            print("everything is as it is recorded")
    return 1 if left else 0
