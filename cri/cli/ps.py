"""`ocid ps`: the containers, running ones unless told."""

from __future__ import annotations

import argparse
import asyncio
import json

from cri.api import api_pb2 as pb
from cri.cli import output
from cri.cli.connect import Api, connect
from cri.cli.names import display_name
from cri.marks import RESTART

_WORDS = {pb.CONTAINER_CREATED: "created", pb.CONTAINER_RUNNING: "running", pb.CONTAINER_EXITED: "exited"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="also those that are not running")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the ids")
    output.format_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        listed = await api.call("ListContainers", pb.ListContainersRequest())
        restarts = {c.id: await _restarts(api, c) for c in listed.containers}
    shown = [c for c in listed.containers if args.all or c.state == pb.CONTAINER_RUNNING]
    shown.sort(key=lambda c: c.created_at, reverse=True)
    if args.quiet:
        for container in shown:
            print(container.id)
    elif args.format == "json":
        output.as_json(
            [
                {
                    "id": c.id,
                    "name": display_name(c),
                    "image": c.image.user_specified_image or c.image.image,
                    "state": _state(c, restarts),
                    "restarts": restarts[c.id][0],
                    "created": c.created_at,
                    "pod": c.pod_sandbox_id,
                    "labels": dict(c.labels),
                }
                for c in shown
            ]
        )
    else:
        output.table(
            ("ID", "NAME", "IMAGE", "STATE", "RESTARTS", "AGE", "POD"),
            [
                (
                    c.id[:12],
                    display_name(c),
                    c.image.user_specified_image or c.image.image,
                    _state(c, restarts),
                    str(restarts[c.id][0]),
                    output.age(c.created_at),
                    c.pod_sandbox_id[:12],
                )
                for c in shown
            ],
        )
    return 0


async def _restarts(api: Api, container: pb.Container) -> tuple[int, bool]:
    """How often it was started again, and whether that is about to happen. What has no policy never is."""
    if not container.annotations.get(RESTART):
        return 0, False
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    info = json.loads((await api.call("ContainerStatus", request)).info.get("info", "{}"))
    return int(info.get("restarts", 0)), container.state == pb.CONTAINER_RUNNING and not info.get("pid")


def _state(container: pb.Container, restarts: dict[str, tuple[int, bool]]) -> str:
    return "restarting" if restarts[container.id][1] else _WORDS.get(container.state, "unknown")
