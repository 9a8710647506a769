"""The OCI runtimes alone: `run` and `exec` of a command that does nothing, ocirun and runc in turn on one bundle."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


def measure(directory: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """(runc, ocirun), p50 in ms, by metric key: `run` from nothing, and `exec` into a container that sleeps."""
    place = bundle(directory / "bundle")
    commands = {
        "runc": ["runc", "--root", str(directory / "runc")],
        "ocirun": [command_path("ocirun"), "--root", str(directory / "ocirun")],
    }
    times: dict[tuple[str, str], list[float]] = {}
    with _asleep(commands, directory / "asleep", place) as names:
        for number in range(rounds + 1):
            for name, command in commands.items():
                fresh = f"bench-{os.getpid()}-{number}"
                calls = {
                    "runtime": [*command, "run", "--bundle", str(place), fresh],
                    "runtime_exec": [*command, "exec", names[name], "/bin/true"],
                }
                for key, arguments in calls.items():
                    took = timed(lambda arguments=arguments: _run(arguments))  # type: ignore[misc]
                    if number:
                        times.setdefault((key, name), []).append(took)
    keys = dict.fromkeys(key for key, _ in times)
    return {key: (median(times[key, "runc"]), median(times[key, "ocirun"])) for key in keys}


@contextmanager
def _asleep(commands: dict[str, list[str]], directory: Path, like: Path) -> Iterator[dict[str, str]]:
    """The id of a container of each runtime that sleeps meanwhile, by the runtime's name."""
    directory.mkdir()
    os.link(like / "rootfs/bin/true", like / "rootfs/bin/sleep")  # busybox goes by its name
    document = json.loads((like / "config.json").read_text())
    document["process"]["args"] = ["/bin/sleep", "86397"]
    document["root"]["path"] = str(like / "rootfs")
    (directory / "config.json").write_text(json.dumps(document))
    names = {name: f"bench-{os.getpid()}-asleep-{name}" for name in commands}
    try:
        for name, command in commands.items():
            _run([*command, "run", "--detach", "--bundle", str(directory), names[name]])
        yield names
    finally:
        for name, command in commands.items():
            subprocess.run([*command, "delete", "--force", names[name]], check=False, stdin=subprocess.DEVNULL)


def _run(arguments: list[str]) -> None:
    # Files: a container that is detached keeps what it was given, and a pipe would not end.
    with tempfile.TemporaryFile() as errors:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
        if (code := subprocess.run(arguments, check=False, **streams).returncode) != 0:  # type: ignore[call-overload]
            errors.seek(0)
            raise RuntimeError(f"{' '.join(arguments)}: exits with {code}: {errors.read()[-500:]!r}")
