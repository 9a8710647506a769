"""`hack/vm`: boots the machine and runs a part of the test suite in it; see conformance/vm/__init__.py."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from conformance.critest import tool
from conformance.images import layouts
from conformance.images.critest import critest
from conformance.kubelet import __main__ as kubelet
from conformance.vm.disk import write_disk
from conformance.vm.image import image
from conformance.vm.machine import boot
from conformance.vm.selection import SESSIONS, left_out

_WITH_PODS = ("pods", "kubelet", "cri_")  # in the names of tests that run the demonstration's image


def _say(text: str) -> None:
    print(f"[vm] {text}", flush=True)


def _built(tests: Sequence[str]) -> list[Path]:
    """What of .cache the tests need: an image for those of pods; critest with its images, and a kubelet, for those that
    play them, where there is a Go compiler."""
    everything = any(path in ("tests", "tests/vm") for path in tests)
    found = layouts(["busybox"]) if everything or any(word in path for path in tests for word in _WITH_PODS) else []
    if everything or any("critest" in path for path in tests):
        if tool.compiler():
            found += [tool.built("critest"), tool.built("ginkgo"), critest()]
        else:
            _say("no Go compiler is here: critest cannot be built, and its test skips")
    if everything or any("kubelet" in path for path in tests):
        if tool.compiler():
            found.append(kubelet.built("kubelet"))
        else:
            _say("no Go compiler is here: no kubelet can be built, and its test skips")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/vm", description="Runs tests in a virtual machine with cgroup v2.")
    parser.add_argument("--rebuild", action="store_true", help="make the image anew")
    parser.add_argument("--shell", action="store_true", help="a shell in the machine instead; it ends with it")
    parser.add_argument("--timeout", type=float, default=2400, metavar="S", help="seconds it may take (default: 2400)")
    parser.add_argument("--runtime", default="", help="what the tests run in ocirun's place, such as runc")
    parser.add_argument("tests", nargs="*", help="arguments of pytest (default: those of selection.py)")
    chosen, flags = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception it takes machine and disks with it
    for line in () if chosen.tests else left_out():
        _say(line)
    made = image(_say, rebuild=chosen.rebuild)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ocid-vm-") as directory:
        write_disk(
            Path(directory, "clone.ext4"),
            [[*flags, *tests] for tests in ([chosen.tests] if chosen.tests else SESSIONS)],
            _built(chosen.tests or ["tests/vm"]),
            shell=chosen.shell,
            runtime=chosen.runtime,
            require_all=bool(os.environ.get("OCID_REQUIRE_ALL")),
        )
        _say(f"booting {made}")
        code = boot(made, Path(directory), chosen.timeout, shell=chosen.shell)
    _say(f"the machine ran for {time.monotonic() - began:.0f} s; exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
