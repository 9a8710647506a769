"""`ocid stats`: what containers use now."""

from __future__ import annotations

import argparse
import asyncio

from cri.api import api_pb2 as pb
from cri.cli import names, output
from cri.cli.connect import connect
from cri.marks import NAME_LABEL


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", nargs="*", help="name or id (default: all that run)")
    output.format_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        wanted = {(await names.find(api, name)).id for name in args.container}
        listed = (await api.call("ListContainerStats", pb.ListContainerStatsRequest())).stats
    shown = [s for s in listed if not wanted or s.attributes.id in wanted]
    if args.format == "json":
        output.as_json(
            [
                {
                    "id": s.attributes.id,
                    "cpu_ns": s.cpu.usage_core_nano_seconds.value,
                    "memory": s.memory.working_set_bytes.value,
                    "disk": s.writable_layer.used_bytes.value,
                    "inodes": s.writable_layer.inodes_used.value,
                }
                for s in shown
            ]
        )
    else:
        output.table(
            ("ID", "NAME", "CPU", "MEMORY", "DISK"),
            [
                (
                    s.attributes.id[:12],
                    s.attributes.labels.get(NAME_LABEL) or s.attributes.metadata.name,
                    f"{s.cpu.usage_core_nano_seconds.value / 1e9:.2f} s",
                    output.size(s.memory.working_set_bytes.value),
                    output.size(s.writable_layer.used_bytes.value),
                )
                for s in shown
            ],
        )
    return 0
