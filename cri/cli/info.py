"""`ocid info`: whether the node can run pods, and what with."""

from __future__ import annotations

import argparse
import asyncio

from cri.api import api_pb2 as pb
from cri.cli import output
from cri.cli.connect import connect


def arguments(parser: argparse.ArgumentParser) -> None:
    output.format_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        status = (await api.call("Status", pb.StatusRequest())).status
        images = len((await api.call("ListImages", pb.ListImagesRequest())).images)
        containers = (await api.call("ListContainers", pb.ListContainersRequest())).containers
        facts = {
            "root": str(api.config.root),
            "state": str(api.config.state),
            "daemon": api.local is None,
            "images": images,
            "containers": len(containers),
            "running": sum(c.state == pb.CONTAINER_RUNNING for c in containers),
            "conditions": {c.type: c.status if c.status else f"false: {c.message}" for c in status.conditions},
        }
    if args.format == "json":
        output.as_json(facts)
    else:
        facts["daemon"] = str(facts["daemon"]).lower()
        rows = [(key, str(value)) for key, value in facts.items() if key != "conditions"]
        rows += [(name, str(value).lower()) for name, value in sorted(dict(facts["conditions"]).items())]
        output.table(("WHAT", "VALUE"), rows)
    return 0
