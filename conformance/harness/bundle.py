"""One bundle and the container of its name: config.json as a dict that a case changes before it is written.

The config is what `runc spec` writes in essence, so that a case shows one difference from the usual. Everything that a
case asks of the container goes through the runtime's command line.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.harness import kernel
from conformance.harness.kernel import eventually

if TYPE_CHECKING:
    from conformance.harness.box import Box, Result

Config = dict[str, Any]

MOUNTS: list[Config] = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
    },
]
NAMESPACES = ("mount", "pid", "network", "ipc", "uts", "cgroup")
# The usual set, without what this kind of machine may lack itself.
CAPABILITIES = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID")


class Bundle:
    """A bundle in a box. Methods that run the runtime return what it said; `up` and `sleeping` expect success."""

    def __init__(self, box: Box, name: str, path: Path, args: list[str]) -> None:
        self.box = box
        self.id = name
        self.path = path
        self.rootfs = path / "rootfs"
        self.cgroup = f"{box.cgroup}/{name}"
        self.config: Config = {
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {
                "args": args,
                "cwd": "/",
                "env": ["PATH=/bin"],
                "user": {"uid": 0, "gid": 0},
                "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
                "noNewPrivileges": True,
            },
            "mounts": copy.deepcopy(MOUNTS),
            "linux": {
                "cgroupsPath": self.cgroup,
                "namespaces": [{"type": kind} for kind in NAMESPACES],
            },
        }

    # ------------------------------------------------------------------------------------------- the config

    @property
    def process(self) -> Config:
        found: Config = self.config["process"]
        return found

    @property
    def linux(self) -> Config:
        found: Config = self.config["linux"]
        return found

    @property
    def resources(self) -> Config:
        found: Config = self.linux.setdefault("resources", {})
        return found

    def mount(self, destination: str, kind: str, source: object, *options: str, **more: Any) -> Bundle:
        """Adds a mount; the bundle itself."""
        entry = {"destination": destination, "type": kind, "source": str(source), "options": list(options), **more}
        self.config["mounts"].append(entry)
        return self

    def namespace(self, kind: str, path: str | None = None) -> Bundle:
        """Adds a namespace, or joins one; in place of one of that kind that is there."""
        self.without_namespace(kind)
        self.linux["namespaces"].append({"type": kind, "path": path} if path else {"type": kind})
        return self

    def without_namespace(self, kind: str) -> Bundle:
        """Leaves the container in the runtime's namespace of a kind."""
        self.linux["namespaces"] = [entry for entry in self.linux["namespaces"] if entry["type"] != kind]
        return self

    def user_namespace(self, host: int = 100_000, size: int = 65_536) -> Bundle:
        """A user namespace that maps 0 and up to `host` and up; the rootfs becomes root's of that."""
        self.namespace("user")
        for key in ("uidMappings", "gidMappings"):
            self.linux[key] = [{"containerID": 0, "hostID": host, "size": size}]
        for directory, names, files in os.walk(self.rootfs):
            for name in (".", *names, *files):
                os.lchown(os.path.join(directory, name), host, host)
        return self

    def capabilities(self, *names: str, kinds: tuple[str, ...] = ("bounding", "effective", "permitted")) -> Bundle:
        """Sets the named capability sets to exactly `names`, and the others to nothing."""
        self.process["capabilities"] = {kind: list(names) for kind in kinds}
        return self

    def write(self) -> Path:
        """config.json on disk."""
        path = self.path / "config.json"
        path.write_text(json.dumps(self.config))
        return path

    # --------------------------------------------------------------------------------------------- commands

    def run(self, *flags: str, **changes: Any) -> Result:
        """`run`, attached."""
        self.write()
        return self.box.call("run", *flags, "--bundle", str(self.path), self.id, **changes)

    def running(self, *flags: str, **changes: Any) -> subprocess.Popen[bytes]:
        """`run`, attached, not waited for."""
        self.write()
        return self.box.popen("run", *flags, "--bundle", str(self.path), self.id, **changes)

    def create(self, *flags: str, **changes: Any) -> Result:
        self.write()
        return self.box.call("create", *flags, "--bundle", str(self.path), self.id, **changes)

    def start(self) -> Result:
        return self.box.call("start", self.id)

    def up(self) -> Bundle:
        """Created and started; the bundle itself."""
        self.create().ok()
        self.start().ok()
        return self

    def exec(self, *words: str, flags: tuple[str, ...] = (), **changes: Any) -> Result:
        return self.box.call("exec", *flags, self.id, *words, **changes)

    def kill(self, *words: str) -> Result:
        return self.box.call("kill", self.id, *words)

    def delete(self, *flags: str) -> Result:
        return self.box.call("delete", *flags, self.id)

    def state(self) -> Config:
        found: Config = self.box.call("state", self.id).json()
        return found

    def status(self) -> str:
        return str(self.state()["status"])

    def pid(self) -> int:
        return int(self.state()["pid"])

    def becomes(self, status: str) -> Bundle:
        """Waits until the container's status is that."""
        eventually(lambda: self.status() == status, f"{self.id} to be {status}")
        return self

    def stopped(self) -> Bundle:
        """Killed, and seen to be; the bundle itself."""
        self.kill("KILL").ok()
        return self.becomes("stopped")

    # ----------------------------------------------------------------------------------- what is to be seen

    def controller(self, name: str) -> Path:
        """The container's cgroup directory in the hierarchy of a controller."""
        return kernel.cgroup(name, self.cgroup)

    def written(self, name: str) -> str:
        """Waits for the container to have written a file (whole lines); its text."""
        file = self.rootfs / name.lstrip("/")
        eventually(lambda: file.exists() and file.read_text().endswith("\n"), f"{name} to be written")
        return file.read_text()
