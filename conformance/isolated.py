"""Runs a module of ours in fresh mount, network, pid, ipc and uts namespaces: what is measured there is alone, and
whatever it leaves behind ends with it.

    python -m conformance.isolated MODULE [ARGUMENT…]

First it becomes `unshare … python -m conformance.isolated --inside MODULE …`, which is pid 1 of the new namespace: it
mounts a fresh /run, brings `lo` up, starts the module as its only child and reaps whatever is reparented to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INSIDE = "--inside"
# Daemons keep files at fixed places here, whatever their own directories are set to.
FRESH = ("/run", "/var/lib/cni")


def reenter(module: str, arguments: list[str]) -> None:
    """Replaces this process by the module in new namespaces; returns only when that is where we are already."""
    if os.environ.get("CONFORMANCE_ISOLATED"):
        return
    if os.geteuid() != 0:
        raise SystemExit(f"{module}: namespaces and mounts need root")
    unshare = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
    os.execvp("unshare", [*unshare, sys.executable, "-m", "conformance.isolated", INSIDE, module, *arguments])


def _inside(command: list[str]) -> int:
    for path in FRESH:
        if Path(path).is_dir():
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", path], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    environment = {**os.environ, "CONFORMANCE_ISOLATED": "1"}
    child = os.posix_spawn(sys.executable, [sys.executable, "-m", *command], environment)
    while True:
        # Orphans of the daemons end up here, as at any init.
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def main() -> int:
    if sys.argv[1:2] == [INSIDE]:
        return _inside(sys.argv[2:])
    reenter(sys.argv[1], sys.argv[2:])
    return 2


if __name__ == "__main__":
    sys.exit(main())
