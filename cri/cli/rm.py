"""`ocid rm`: removes containers that have ended, or any with --force; the pod of an `ocid run` goes with it."""

from __future__ import annotations

import argparse
import asyncio
import os

from cri.api import api_pb2 as pb
from cri.cli import names
from cri.cli.connect import Api, connect
from cri.cli.main import CommandError
from cri.marks import LOGS, VOLUMES
from runtime.linux.files import remove_tree


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--force", action="store_true", help="stop running ones first; none of that name is no failure"
    )
    parser.add_argument("container", nargs="+", help="name or id")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:

        async def one(wanted: str) -> None:
            try:
                container = await names.find(api, wanted)
            except names.NoContainer:
                if args.force:
                    return
                raise
            if container.state == pb.CONTAINER_RUNNING and not args.force:
                raise CommandError(f"{wanted} is running; stop it first, or rm --force", 1)
            await remove(api, container)
            print(wanted)

        return await names.each(args, args.container, one)


async def remove(api: Api, container: pb.Container) -> None:
    """Takes the container away, and its pod and its log where `ocid run` made those for it alone."""
    status = await api.call("ContainerStatus", pb.ContainerStatusRequest(container_id=container.id))
    ours = names.is_ours(container)
    if not ours or container.state != pb.CONTAINER_EXITED:  # else its pod takes it along
        await api.call("RemoveContainer", pb.RemoveContainerRequest(container_id=container.id))
    if ours:
        await drop_pod(api, container.pod_sandbox_id)
        if status.status.log_path:
            remove_tree(os.path.dirname(status.status.log_path))


async def remove_pod(api: Api, pod: str, root: str, uid: str) -> None:
    """Takes the pod away ("" for none), and what lies on disk for its uid."""
    if pod:
        await drop_pod(api, pod)
    for kind in (LOGS, VOLUMES):
        remove_tree(f"{root}/{kind}/{uid}")


async def drop_pod(api: Api, pod: str) -> None:
    """Stops and removes the pod, with what is in it."""
    await api.call("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=pod))
