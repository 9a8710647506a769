"""python -m conformance.crictl [--runtime ocid|containerd] [--transcript FILE]

Runs the scenario in namespaces of its own, prints each step, and at the end what is left over. Exit code 1 when any
step fails; the steps after it still run, so that one run shows everything. With --transcript it goes through every
subcommand instead (`tour`), and writes what was typed and printed to FILE.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from conformance import daemons
from conformance.clients.steps import Surprise
from conformance.crictl.scenario import STEPS
from conformance.crictl.steps import Scenario
from conformance.crictl.tool import CheckFailed, Crictl, built
from conformance.crictl.tour import transcript
from conformance.images import BUSYBOX, layouts, push
from conformance.isolated import reenter
from conformance.leaks import Machine, settled
from conformance.registry import registry

IMAGES = ("busybox",)


def run(runtime: str, base: Path, binary: Path, target: Path | None = None) -> int:
    """How many steps failed, and how many things are left over. With a `target` the tour is made, and written there."""
    with registry(base / "registry") as images:
        for layout in layouts(IMAGES):
            push(layout, images.address)
        cgroup = f"scenario-{base.name}"
        config = base / "crictl.yaml"
        config.write_text("")
        directory = base / runtime
        directory.mkdir()
        before = Machine.now()
        with ExitStack() as stack:
            stack.callback(daemons.remove_cgroup, cgroup)
            if runtime == "ocid":
                daemon = stack.enter_context(daemons.ocid(directory))
            else:
                daemon = stack.enter_context(daemons.containerd(directory, images.address))
            crictl, image = Crictl(binary, daemon.socket, config), images.reference(BUSYBOX)
            if target is not None:
                target.write_text(transcript(crictl, image, directory, f"/{cgroup}"))
                return 0
            it = Scenario(crictl, image, directory, f"/{cgroup}")
            if runtime == "containerd":
                it.on_containerd()
            failed = _steps(it)
            if failed:
                print(f"--- the end of {daemon.log.name}:\n{daemon.log.read_text()[-4000:]}")
        return failed + (_leaks(before) if runtime == "ocid" else 0)


def _steps(it: Scenario) -> int:
    failed = 0
    for step in STEPS:
        began = time.perf_counter()
        try:
            step(it)
            outcome = "ok"
        except (CheckFailed, Surprise, OSError, KeyError, IndexError, ValueError) as error:
            outcome = f"FAILED: {type(error).__name__}: {error}"
            failed += 1
        print(f"  {step.__name__:14} {(time.perf_counter() - began) * 1000:6.0f} ms  {outcome}", flush=True)
    return failed


def _leaks(before: Machine) -> int:
    """Counts what is left when the daemon is gone too."""
    found = settled(before)
    for line in found:
        print(f"  left over: {line}")
    return len(found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance.crictl", description=__doc__)
    parser.add_argument("--runtime", choices=("ocid", "containerd"), default="ocid")
    parser.add_argument(
        "--transcript", type=Path, metavar="FILE", help="go through every subcommand, and write it down"
    )
    args = parser.parse_args()
    binary = built()
    layouts(IMAGES)  # before the namespaces, as the build of crictl: both may need the network
    reenter("conformance.crictl", sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="crictl-") as base:
        failed = run(args.runtime, Path(base), binary, args.transcript)
    print(f"crictl scenario against {args.runtime}: {'passed' if not failed else f'{failed} failed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
