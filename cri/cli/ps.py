"""`ocid ps`: the containers, running ones unless told; newest first."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from typing import Any

from cri.api import api_pb2 as pb
from cri.cli import filters, output
from cri.cli.connect import Api, connect
from cri.cli.names import display_name
from cri.cli.template import Template
from cri.marks import RESTART

_WORDS = {pb.CONTAINER_CREATED: "created", pb.CONTAINER_RUNNING: "running", pb.CONTAINER_EXITED: "exited"}
# On what a filter looks: a row of `_row`. An id may be its beginning, a name any part of it, as with docker.
_FILTERS = {
    "id": lambda row, value: row["id"].startswith(value),
    "name": lambda row, value: value in row["name"],
    "status": lambda row, value: row["state"] == value,
    "label": lambda row, value: filters.has_label(row["labels"], value),
    "ancestor": lambda row, value: value in (row["image"], row["image"].rpartition(":")[0]),
    "pod": lambda row, value: row["pod"].startswith(value),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="also those that are not running")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the ids")
    parser.add_argument("-n", "--last", type=int, metavar="N", help="only the N made last, whether or not they run")
    parser.add_argument("-l", "--latest", action="store_const", dest="last", const=1, help="the same as -n 1")
    parser.add_argument("--no-trunc", action="store_true", help="whole ids")
    filters.argument(parser, tuple(_FILTERS))
    output.format_argument(parser, templates=True)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        listed = await api.call("ListContainers", pb.ListContainersRequest())
        restarts = {c.id: await _restarts(api, c) for c in listed.containers}
    holds = filters.matching(args.filter, _FILTERS)
    everything = args.all or args.last is not None or any(text.startswith("status=") for text in args.filter)
    newest = sorted(listed.containers, key=lambda c: c.created_at, reverse=True)
    rows = [_row(c, restarts) for c in newest if everything or c.state == pb.CONTAINER_RUNNING]
    rows = [row for row in rows if holds(row)][: args.last]
    if args.quiet:
        for row in rows:
            print(row["id"])
    elif args.format == "json":
        output.as_json(rows)
    elif args.format == "table":
        headings = ("ID", "NAME", "IMAGE", "STATE", "RESTARTS", "AGE", "POD")
        output.table(headings, [_cells(row, None if args.no_trunc else 12) for row in rows])
    else:
        template = Template(args.format)
        for row in rows:
            print(template.render(_in_dockers_words(row, None if args.no_trunc else 12)))
    return 0


def _row(c: pb.Container, restarts: dict[str, tuple[int, bool]]) -> dict[str, Any]:
    return {
        "id": c.id,
        "name": display_name(c),
        "image": c.image.user_specified_image or c.image.image,
        "state": _state(c, restarts),
        "restarts": restarts[c.id][0],
        "created": c.created_at,
        "pod": c.pod_sandbox_id,
        "labels": dict(c.labels),
    }


def _cells(row: Mapping[str, Any], length: int | None) -> tuple[str, ...]:
    age, restarts = output.age(row["created"]), str(row["restarts"])
    return row["id"][:length], row["name"], row["image"], row["state"], restarts, age, row["pod"][:length]


def _in_dockers_words(row: Mapping[str, Any], length: int | None) -> dict[str, Any]:
    return {
        "ID": row["id"][:length],
        "Names": row["name"],
        "Image": row["image"],
        "State": row["state"],
        "Status": row["state"],
        "RunningFor": output.age(row["created"]),
        "Labels": row["labels"],
        "Restarts": row["restarts"],
        "Pod": row["pod"][:length],
    }


async def _restarts(api: Api, container: pb.Container) -> tuple[int, bool]:
    """How often it was started again, and whether that is about to happen. What has no policy never is."""
    if not container.annotations.get(RESTART):
        return 0, False
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    info = json.loads((await api.call("ContainerStatus", request)).info.get("info", "{}"))
    return int(info.get("restarts", 0)), container.state == pb.CONTAINER_RUNNING and not info.get("pid")


def _state(container: pb.Container, restarts: dict[str, tuple[int, bool]]) -> str:
    return "restarting" if restarts[container.id][1] else _WORDS.get(container.state, "unknown")
