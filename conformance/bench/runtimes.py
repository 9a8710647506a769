"""The OCI runtimes alone: `run` of a container that does nothing, ocirun and runc in turn on one bundle."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from conformance.bench.subject import median, timed
from conformance.daemons import command_path


def bundle(directory: Path) -> Path:
    """A bundle that runs `true` from a rootfs with nothing but busybox, from `runc spec`'s defaults."""
    rootfs = directory / "rootfs"
    for name in ("bin", "dev", "proc", "sys", "etc"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / "bin" / "true").write_bytes(Path("/bin/busybox").read_bytes())
    (rootfs / "bin" / "true").chmod(0o755)
    subprocess.run(["runc", "spec"], cwd=directory, check=True)
    document = json.loads((directory / "config.json").read_text())
    document["process"].update(terminal=False, args=["/bin/true"])
    # Raising limits needs CAP_SYS_RESOURCE, which not every machine gives.
    document["process"].pop("rlimits", None)
    (directory / "config.json").write_text(json.dumps(document))
    return directory


def measure(directory: Path, rounds: int) -> tuple[float, float]:
    """(runc, ocirun): p50 in ms."""
    place = bundle(directory / "bundle")
    commands = {
        "runc": ["runc", "--root", str(directory / "runc")],
        "ocirun": [command_path("ocirun"), "--root", str(directory / "ocirun")],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            took = timed(lambda c=command, n=number: _run(c, place, n))  # type: ignore[misc]
            if number:
                times[name].append(took)
    return median(times["runc"]), median(times["ocirun"])


def _run(command: list[str], place: Path, number: int) -> None:
    arguments = [*command, "run", "--bundle", str(place), f"bench-{os.getpid()}-{number}"]
    result = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: exits with {result.returncode}: {result.stderr[-500:]!r}")
