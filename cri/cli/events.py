"""`ocid events`: what happens on this node as it happens, a line each: containers, steps of pulls and of loads.

Refuses to invent a past: it begins when it is called. Invariant: with --format json each line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from cri.api import api_pb2 as pb
from cri.cli.connect import Api, connect
from cri.cli.main import CommandError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text", help="how to print (default: text)")
    parser.add_argument("--filter", choices=("pulls", "containers"), help="only these")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        if api.local is not None:
            raise CommandError("no daemon serves this state directory, so nothing happens there")
        async with asyncio.TaskGroup() as group:
            if args.filter != "containers":
                group.create_task(_pulls(api, args.format))
            if args.filter != "pulls":
                group.create_task(_containers(api, args.format))
    return 0


async def _pulls(api: Api, form: str) -> None:
    phases: dict[tuple[str, str], tuple[str, int]] = {}
    async for step in api.pulls():
        key = (step["image"], step["digest"])
        # A line for each phase and each tenth of it: nobody reads every megabyte.
        now = (step["phase"], step["done"] * 10 // max(step["total"], 1))
        if phases.get(key) == now:
            continue
        phases[key] = now
        words = f"{step['digest'][7:19]} {step['phase']} {step['done']}/{step['total']}"
        _print({"kind": "pull", **step}, f"pull {step['image']} {words}", form)


async def _containers(api: Api, form: str) -> None:
    from google.protobuf.json_format import MessageToDict

    async for event in api.stream("GetContainerEvents", pb.GetEventsRequest()):
        kind = pb.ContainerEventType.Name(event.container_event_type).removesuffix("_EVENT").lower()
        document = {"kind": kind, **MessageToDict(event)}
        _print(document, f"{kind} {event.container_id}", form)


def _print(document: dict[str, Any], words: str, form: str) -> None:
    text = json.dumps(document) if form == "json" else "".join(c if c.isprintable() else "?" for c in words)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
