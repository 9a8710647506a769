"""python -m conformance.clients [podman|rootless-podman|containerd|crictl …] [--runtime runc|ocirun] [--only WORD]

Plays every step of the clients named (all, if none) with runc first, which proves the steps, then with ocirun; in
namespaces of its own. Exit code 1 when any step failed or anything is left over.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conformance.clients import cri, ctr, podman
from conformance.clients.podman import namespaces, ordinary
from conformance.clients.steps import Score, play
from conformance.crictl.tool import built
from conformance.images import BUSYBOX, layouts, push
from conformance.isolated import reenter
from conformance.leaks import SETTLE_S, Machine, left_over
from conformance.registry import Registry, registry

RUNTIMES = ("runc", "ocirun")
IMAGES = ("busybox",)


def with_podman(runtime: str, base: Path, images: Registry, only: str) -> Score:
    with podman.podman(runtime, base, images.reference(BUSYBOX)) as client:
        return play(client, podman.STEPS, only)


def with_rootless_podman(runtime: str, base: Path, images: Registry, only: str) -> Score:
    with ordinary.ordinary(runtime, base, images.reference(BUSYBOX)) as client:
        return play(client, ordinary.STEPS, only)


def with_containerd(runtime: str, base: Path, images: Registry, only: str) -> Score:
    with ctr.ctr(runtime, base, images, BUSYBOX) as client:
        return play(client, ctr.STEPS, only)


def with_crictl(runtime: str, base: Path, images: Registry, only: str) -> Score:
    with cri.cri(runtime, base, images, built()) as client:
        return play(client, cri.STEPS, only)


CLIENTS: dict[str, Callable[[str, Path, Registry, str], Score]] = {
    "podman": with_podman,
    "rootless-podman": with_rootless_podman,
    "containerd": with_containerd,
    "crictl": with_crictl,
}


@contextmanager
def subordinate_ids(base: Path) -> Iterator[None]:
    """Gives the user "containers" ids for `--userns=auto`, and the ordinary one his, in this mount namespace only."""
    owners = (("containers", *namespaces.SUBIDS), (ordinary.NAME, *ordinary.SUBIDS))
    file = base / "subids"
    file.write_text("".join(f"{name}:{first}:{count}\n" for name, first, count in owners))
    with ExitStack() as stack:
        for target in ("/etc/subuid", "/etc/subgid"):
            subprocess.run(["mount", "--bind", file, target], check=True)
            stack.callback(subprocess.run, ["umount", target], check=True)
        yield


def left(before: Machine, mark: str) -> int:
    """Prints what is left over below `mark` or in this network and pid namespace. Those of cgroups are the machine's:
    of these only what carries the mark counts."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        found = [line for line in left_over(before, Machine.now()) if not line.startswith(("cgroup", "nftables table"))]
        found += [line for line in left_over(before, Machine.now(), ["libpod-", mark]) if line.startswith("cgroup")]
        if not found or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for line in found:
        print(f"  left over: {line}")
    points = [mount.split(" (")[0] for mount in Machine.now().mounts]
    for point in sorted((point for point in points if mark in point), reverse=True):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
    return len(found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance.clients", description=__doc__)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS))
    parser.add_argument("--runtime", choices=RUNTIMES, action="append")
    parser.add_argument("--only", default="", metavar="WORD", help="only steps with this in their name")
    args = parser.parse_args()
    for name in args.clients:
        if name not in CLIENTS:
            parser.error(f"no client {name!r}: there are {', '.join(CLIENTS)}")
    if "crictl" in (args.clients or CLIENTS):
        built()  # before the namespaces: a build may need the network, as images do
    layouts(IMAGES)
    reenter("conformance.clients", sys.argv[1:])
    total = Score()
    with tempfile.TemporaryDirectory(prefix="clients-") as directory, registry(Path(directory) / "registry") as images:
        for layout in layouts(IMAGES):
            push(layout, images.address)
        with subordinate_ids(Path(directory)):
            before = Machine.now()
            for client in args.clients or CLIENTS:
                for runtime in args.runtime or RUNTIMES:
                    print(f"{client} with {runtime}")
                    base = Path(directory) / f"{client[:4]}-{runtime}"  # podman takes 50 characters for a runroot
                    base.mkdir()
                    total.add(CLIENTS[client](runtime, base, images, args.only))
            total.failed += left(before, Path(directory).name)
    print(f"{total.passed} passed, {total.failed} failed")
    return 1 if total.failed else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
