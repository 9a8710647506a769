"""`ocid gc`: removes what no image, container or pull needs; with --dry-run tells what that is, and why."""

from __future__ import annotations

import argparse
import asyncio

from cri.cli import output
from cri.cli.connect import connect


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--dry-run", action="store_true", help="remove nothing")
    output.format_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        found = (await api.own("Garbage", {}))["garbage"]
        if not args.dry_run:
            await api.own("Collect", {})
    if args.format == "json":
        output.as_json(found)
        return 0
    rows = [(item["kind"], item["name"], output.size(item["bytes"]), item["why"]) for item in found]
    if rows:
        output.table(("KIND", "NAME", "SIZE", "WHY"), rows)
    total = output.size(sum(item["bytes"] for item in found))
    print(f"{len(found)} things, {total}{' would be freed' if args.dry_run else ' freed'}")
    return 0
