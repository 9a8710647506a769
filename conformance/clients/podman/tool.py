"""podman as a subprocess: arguments in, what it printed out; a code other than the expected one is a Surprise.

Everything of it lives below one directory, which is also its working directory: conmon 2.1.6 leaves its file "oom"
there on cgroup v1. Refuses nothing. Invariant: `tidy` leaves no container, pod, volume or secret.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance import daemons
from conformance.clients.steps import Surprise
from conformance.clients.terminal import Terminal

CALL_S = 60
TIDY_CALLS = 4
# Of its default network, and of the one that `play kube` makes.
BRIDGES = ("cni-podman0", "cni-podman1")
CONFIGURATION = """\
[containers]
default_sysctls = []
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
image_default_transport = "docker://"
[engine.runtimes]
runc = ["{runc}"]
ocirun = ["{ocirun}"]
[network]
network_backend = "cni"
network_config_dir = "{directory}/net.d"
"""


@dataclass(slots=True)
class Podman:
    """`image` is in its store already."""

    runtime: str
    directory: Path
    image: str
    used: bool = field(default=False)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "CONTAINERS_CONF": str(self.directory / "containers.conf"), "HOME": str(self.directory)}

    def words(self, *words: object) -> list[str]:
        at = self.directory
        own = ("--root", at / "root", "--runroot", at / "run", "--tmpdir", at / "tmp")
        return [
            str(word) for word in ("podman", *own, "--storage-driver", self.driver, "--runtime", self.runtime, *words)
        ]

    @property
    def driver(self) -> str:
        return "overlay"

    def result(self, *words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """What it did, unjudged."""
        self.used = True
        return subprocess.run(
            self.words(*words),
            cwd=self.directory,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
        )

    def __call__(self, *words: object, code: int = 0, stdin: str = "") -> str:
        """Its standard output; of a call that is expected to fail, both streams."""
        result = self.result(*words, stdin=stdin)
        if result.returncode != code:
            said = f"{result.stderr.strip()} {result.stdout.strip()}".strip()
            raise Surprise(
                f"podman {' '.join(map(str, words))}: expected exit code {code}, got {result.returncode}: {said}"
            )
        return result.stdout.strip() if code == 0 else f"{result.stdout.strip()}\n{result.stderr.strip()}"

    def run(self, *words: object, code: int = 0, stdin: str = "") -> str:
        """`podman run --rm --net none OPTIONS IMAGE COMMAND`, with "IMAGE" in `words` for the image."""
        return self("run", "--rm", "--net", "none", *self._named(words), code=code, stdin=stdin)

    def start(self, name: str, *words: object) -> str:
        """A detached container of that name; its id. Without a command it sleeps."""
        command = words if "IMAGE" in words else (*words, "IMAGE", "sleep", "3600")
        return self("run", "-d", "--net", "none", "--name", name, *self._named(command))

    def shell(self, script: str, *options: object, code: int = 0) -> str:
        """What a script prints in a container of its own."""
        return self.run(*options, "IMAGE", "sh", "-c", script, code=code)

    def terminal(self, *words: object, lines: int = 30, columns: int = 100) -> Terminal:
        self.used = True
        return Terminal(self.words(*self._named(words)), self.directory, self.environment, lines, columns)

    def inspect(self, name: str) -> Any:
        return json.loads(self("inspect", name))[0]

    def state(self, name: str) -> str:
        return str(self.inspect(name)["State"]["Status"])

    def pid(self, name: str) -> int:
        return int(self.inspect(name)["State"]["Pid"])

    def file(self, name: str, text: str = "", mode: int = 0o644) -> Path:
        path = self.directory / name
        path.write_text(text)
        path.chmod(mode)
        return path

    def folder(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path

    def tidy(self) -> None:
        if not self.used:
            return
        self.used = False
        self("pod", "rm", "--all", "--force", "--time", "0")
        words = ("rm", "--all", "--force", "--depend", "--volumes", "--time", "0")
        # podman 4.3 removes all at once and stumbles over those that others depend on, and over a /dev/shm of another
        # that is still being unmounted: what is left is for the next call.
        for _ in range(TIDY_CALLS - 1):
            if self.result(*words).returncode == 0:
                return
        self(*words)

    def _named(self, words: tuple[object, ...]) -> list[object]:
        return [self.image if word == "IMAGE" else word for word in words]


def configure(directory: Path) -> None:
    """Writes containers.conf, and makes room for networks."""
    (directory / "net.d").mkdir(parents=True)
    (directory / "containers.conf").write_text(
        CONFIGURATION.format(
            directory=directory, runc=shutil.which("runc") or "runc", ocirun=daemons.command_path("ocirun")
        )
    )


@contextmanager
def podman(runtime: str, directory: Path, image: str) -> Iterator[Podman]:
    """podman with `image` pulled from the registry it names, over plain HTTP."""
    configure(directory)
    it = Podman(runtime, directory, image)
    it("pull", "--quiet", "--tls-verify=false", image)
    try:
        yield it
    finally:
        it.tidy()
        it("network", "prune", "--force")
        it("rmi", "--all", "--force")
        # Podman keeps its graph directory as a mount of its own, so that nothing propagates out of it.
        subprocess.run(["umount", "--quiet", directory / "root" / "overlay"], capture_output=True, check=False)
        for bridge in BRIDGES:
            subprocess.run(["ip", "link", "delete", bridge], capture_output=True, check=False)
        subprocess.run(["umount", "--quiet", "/run/netns"], capture_output=True, check=False)
        daemons.remove_cgroup("libpod_parent")
