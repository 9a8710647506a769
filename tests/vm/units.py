"""Bundles whose cgroups are units of systemd's, in a slice of the test's own; and systemctl."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.linux.process import set_child_subreaper
from tests.bundles import Bundle, Bundles
from tests.support import eventually

CGROUPS = Path("/sys/fs/cgroup")


def systemctl(*words: str, check: bool = True) -> str:
    """What it printed."""
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 or not check, done
    return done.stdout


def reexecute() -> None:
    """systemctl daemon-reexec, until the new systemd is on the bus: systemctl returns once the old one has left it."""
    before = _owner()
    systemctl("daemon-reexec")
    eventually(lambda: _owner() not in ("", before), what="systemd on the bus")


def _owner() -> str:
    """Systemd's name on the bus of the moment; "" while it has none."""
    words = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetNameOwner", "s")
    done = subprocess.run(
        ["busctl", "call", *words, "org.freedesktop.systemd1"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout


def shown(unit: str, *names: str) -> dict[str, str]:
    """Properties of a unit as systemd tells them."""
    text = systemctl("show", unit, *(f"--property={name}" for name in names))
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def known_units(pattern: str) -> list[str]:
    """Units in any state, failed ones too, that systemd has loaded."""
    text = systemctl("list-units", "--all", "--plain", "--no-legend", pattern)
    return [line.split()[0] for line in text.splitlines() if line.strip()]


class Units(Bundles):
    """`cgroup` is the slice; every command has --systemd-cgroup."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        # A dash would be one level more.
        self.cgroup = self.cgroup.replace("-", "") + ".slice"

    def make(self, *args: str) -> Bundle:
        made = super().make(*args)
        made.linux["cgroupsPath"] = f"{self.cgroup}:test:{made.id}"
        return made

    def command(self, *words: str) -> list[str]:
        runtime, *rest = super().command(*words)
        return [runtime, "--systemd-cgroup", *rest]

    def unit(self, bundle: Bundle) -> str:
        return f"test-{bundle.id}.scope"

    def cgroups(self, name: str = "") -> list[str]:
        top = CGROUPS / self.cgroup
        found = [path for path in top.iterdir() if path.is_dir()] if top.is_dir() else []
        return [str(path) for path in found if not name or path.name == f"test-{name}.scope"]

    def close(self) -> None:
        super().close()
        assert known_units("test-*.scope") == []
        systemctl("stop", self.cgroup)


def cgroup_of(bundle: Bundle) -> Path:
    """Where the kernel has the container's init."""
    (line,) = Path(f"/proc/{bundle.pid()}/cgroup").read_text().splitlines()
    return CGROUPS / line.removeprefix("0::/")


def value(bundle: Bundle, file: str) -> str:
    """What a file of the container's cgroup holds."""
    return (cgroup_of(bundle) / file).read_text().strip()


@contextmanager
def units(directory: Path) -> Iterator[Units]:
    """As tests.bundles.bundles, with units."""
    opened = Units(directory)
    set_child_subreaper(True)
    try:
        yield opened
    finally:
        try:
            opened.close()
        finally:
            set_child_subreaper(False)
