"""`ocid pod`: pods of a Kubernetes file on this machine, without a cluster.

    play FILE    makes and starts the pods that it describes ("-": standard input); --replace: those of before go
    down FILE    takes down the pods that it names
    ps           lists them
    rm NAME…     takes pods down by name; -f also where containers run

Of a Pod it takes containers, init containers, environment, volumes (emptyDir, hostPath, configMap of the same file),
ports, resources, securityContext and restartPolicy; ConfigMap documents beside it. Refuses every other field by its
path. Invariant: all of a file is understood before anything is made, and a pod that cannot be started leaves nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from cri.api import api_pb2 as pb
from cri.cli import addresses, names, output
from cri.cli.connect import Api, connect
from cri.cli.main import CommandError
from cri.cli.rm import remove_pod
from cri.marks import GRACE, POD_LABEL
from runtime.errors import RuntimeFailure

_READ = (1 << 20) + 1


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (__doc__ or "").partition("\n\nOf a Pod")[0]
    actions = parser.add_subparsers(dest="action", required=True, metavar="play|down|ps|rm")
    play = actions.add_parser("play", help="make and start the pods of a file")
    play.add_argument("--replace", action="store_true", help="first take down pods of these names")
    down = actions.add_parser("down", help="take down the pods that a file names")
    for one in (play, down):
        one.add_argument("file", help='YAML or JSON; "-" for standard input')
    output.format_argument(actions.add_parser("ps", help="list pods that were played"))
    remove = actions.add_parser("rm", help="take down pods by name")
    remove.add_argument("-f", "--force", action="store_true", help="also pods whose containers run")
    remove.add_argument("name", nargs="+", help="a pod")


def run(args: argparse.Namespace) -> int:
    try:
        return asyncio.run({"play": _play, "down": _down, "ps": _ps, "rm": _rm}[args.action](args))
    except RuntimeFailure as error:
        if args.action in ("play", "down"):
            raise CommandError(str(error)) from None
        raise


def _text(path: str) -> bytes:
    """The file, or a little more than is ever read of one."""
    if path == "-":
        return sys.stdin.buffer.read(_READ)
    try:
        with open(path, "rb") as file:
            return file.read(_READ)
    except OSError as error:
        raise CommandError(f"read {path}: {error.strerror}") from None


async def _play(args: argparse.Namespace) -> int:
    from cri.cli.play import plan, play

    addresses.random()  # here: an image may have to be fetched when other pods are up, or stdin has been read
    planned = plan(args, _text(args.file))
    async with connect(args) as api:
        for pod in planned:
            if args.replace:
                for before in await found(api, pod.name):
                    await take_down(api, before)
            print(await play(api, pod))
    return 0


async def _down(args: argparse.Namespace) -> int:
    from cri.podfile.pod import names as pods_of

    return await _take_away(args, pods_of(_text(args.file), args.file), force=True)


async def _rm(args: argparse.Namespace) -> int:
    return await _take_away(args, args.name, force=args.force)


async def _take_away(args: argparse.Namespace, wanted: list[str], *, force: bool) -> int:
    async with connect(args) as api:

        async def one(name: str) -> None:
            pods = await found(api, name)
            if not pods:
                raise CommandError(f"there is no pod {name!r}; see ocid pod ps", 1)
            if not force and any([await _running(api, pod) for pod in pods]):
                raise CommandError(f"{name} is running; ocid pod rm --force {name} ends it first", 1)
            for pod in pods:
                await take_down(api, pod)
            print(name)

        return await names.each(args, wanted, one)


async def found(api: Api, name: str) -> list[pb.PodSandbox]:
    """The pods of that name that a file was played for."""
    wanted = pb.PodSandboxFilter(label_selector={POD_LABEL: name})
    return list((await api.call("ListPodSandbox", pb.ListPodSandboxRequest(filter=wanted))).items)


async def containers(api: Api, pod: pb.PodSandbox) -> list[pb.Container]:
    """The containers of a pod."""
    wanted = pb.ContainerFilter(pod_sandbox_id=pod.id)
    return list((await api.call("ListContainers", pb.ListContainersRequest(filter=wanted))).containers)


async def _running(api: Api, pod: pb.PodSandbox) -> bool:
    return any(one.state == pb.CONTAINER_RUNNING for one in await containers(api, pod))


async def take_down(api: Api, pod: pb.PodSandbox) -> None:
    """Stops its containers, all at once, within the time that the file gives them; then nothing of it is left."""
    grace = int(pod.annotations.get(GRACE, "10"))
    requests = [
        pb.StopContainerRequest(container_id=one.id, timeout=grace)
        for one in await containers(api, pod)
        if one.state == pb.CONTAINER_RUNNING
    ]
    await asyncio.gather(*(api.call("StopContainer", request) for request in requests))
    await remove_pod(api, pod.id, str(api.config.root), pod.metadata.uid)


async def _ps(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        listed = (await api.call("ListPodSandbox", pb.ListPodSandboxRequest())).items
        rows = []
        for pod in sorted(listed, key=lambda one: int(one.created_at), reverse=True):
            if POD_LABEL in pod.labels:
                rows.append((pod, await containers(api, pod)))
    if args.format == "json":
        output.as_json([_row(pod, inside) for pod, inside in rows])
        return 0
    output.table(
        ("NAME", "ID", "STATE", "CONTAINERS", "AGE"),
        [
            (pod.labels[POD_LABEL], pod.id[:12], _state(pod, inside), str(len(inside)), output.age(pod.created_at))
            for pod, inside in rows
        ],
    )
    return 0


def _row(pod: pb.PodSandbox, inside: list[pb.Container]) -> dict[str, object]:
    return {
        "id": pod.id,
        "name": pod.labels[POD_LABEL],
        "state": _state(pod, inside),
        "created": pod.created_at,
        "containers": [{"id": one.id, "name": one.metadata.name} for one in inside],
    }


def _state(pod: pb.PodSandbox, inside: list[pb.Container]) -> str:
    """running while something of it runs."""
    runs = pod.state == pb.SANDBOX_READY and any(one.state == pb.CONTAINER_RUNNING for one in inside)
    return "running" if runs else "exited"
