"""Which container somebody means: a name given to `ocid run`, a full id, or the beginning of one.

Refuses to guess: two that match are an error that lists them. Invariant: only a running `ocid run` or a kubelet makes
names; here they are only read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from cri.api import api_pb2 as pb
from cri.cli.connect import Api
from cri.cli.main import CommandError
from cri.marks import NAME_LABEL, POD_LABEL
from runtime.shim.model import Sandbox


class NoContainer(CommandError):
    """Nothing is called so."""


async def find(api: Api, wanted: str, code: int = 1) -> pb.Container:
    """The container that `wanted` names. Raises CommandError, with that exit code, when there is none or more than
    one."""
    listed = await api.call("ListContainers", pb.ListContainersRequest())
    found = [c for c in listed.containers if wanted in (c.labels.get(NAME_LABEL), _name_in_pod(c), c.id)]
    if not found and len(wanted) >= 3:
        found = [c for c in listed.containers if c.id.startswith(wanted)]
    if not found:
        found = [c for c in listed.containers if c.metadata.name == wanted]
    if not found:
        raise NoContainer(f"there is no container {wanted!r}; see ocid ps -a", code)
    if len(found) > 1:
        ids = ", ".join(c.id[:12] for c in found)
        raise CommandError(f"{wanted!r} could be any of {ids}; say more of the id", code)
    only: pb.Container = found[0]
    return only


def display_name(container: pb.Container) -> str:
    """What a person calls it."""
    return str(container.labels.get(NAME_LABEL) or _name_in_pod(container) or container.metadata.name)


def _name_in_pod(container: pb.Container) -> str:
    """What a container of `ocid pod play` is called: its pod's name and its own."""
    pod = container.labels.get(POD_LABEL)
    return f"{pod}-{container.metadata.name}" if pod else ""


def is_ours(container: pb.Container) -> bool:
    """True for a container that `ocid run` made: its pod is its own and goes with it."""
    return NAME_LABEL in container.labels


def sandbox(state: Path, pod: str) -> Sandbox:
    """A pod's shim for who asks it without a daemon between: whoever answers in its directory."""
    return Sandbox(pod, state / "pods" / pod, 0, 0)


async def each(args: argparse.Namespace, wanted: list[str], act: Callable[[str], Awaitable[None]]) -> int:
    """`act` on every one of them, whatever becomes of the others; a failure is said at once. The exit code: 1 where one
    of several has failed. Raises the CommandError of an only one."""
    if len(wanted) == 1:
        await act(wanted[0])
        return 0
    failed = 0
    for name in wanted:
        try:
            await act(name)
        except CommandError as error:
            sys.stdout.flush()
            print(f"ocid {args.subcommand}: {error}", file=sys.stderr)
            failed = 1
    return failed
