"""Busybox bundles in a test's own directory, `ocirun` on them, and proof that nothing of them is left.

A `Bundle` holds config.json as a dict that tests change before they run it; output goes through files, since a created
container keeps the pipes that a test would wait for. `bundles(tmp_path)` is what a fixture yields: it makes bundles,
and at its end deletes every container and looks for mounts, cgroups, processes and state that are still there.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from conformance.leaks import contents
from runtime import lifecycle
from runtime.linux.mount import mountinfo
from runtime.linux.process import set_child_subreaper
from tests.support import SOON_S, cgroup_tops, eventually, take_away, take_away_cgroup

# Another runtime takes its place where a test is to be seen to hold for that one too (hack/vm --runtime).
OCID_RUNTIME = os.environ.get("OCID_RUNTIME")
OCIRUN = OCID_RUNTIME or str(Path(sys.executable).parent / "ocirun")
CGROUP = os.environ.get("OCID_TEST_CGROUP", "ocirun-test")
APPLETS = (
    *("sh", "cat", "echo", "sleep", "true", "false", "seq", "ls", "kill", "id", "mount", "stty", "wc", "printf"),
    *("test", "rm", "grep", "pwd", "hostname", "stat", "readlink", "env", "tr", "mkdir", "dd", "head", "sort", "touch"),
    *("umount", "unshare", "cut", "ln", "mknod", "ps", "ip", "chmod", "tail", "od", "sha256sum", "tty", "nc"),
)
BASE_MOUNTS: list[dict[str, Any]] = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
    },
]
ALL_NAMESPACES = ("mount", "pid", "network", "ipc", "uts", "cgroup")
# The default set of Docker and Kubernetes, without what this kind of machine may lack itself.
CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE"]
_numbers = itertools.count()


class Result:
    """What a command said; `text` and `error` are stdout and stderr."""

    def __init__(self, code: int, text: str, error: str) -> None:
        self.code = code
        self.text = text
        self.error = error

    def __repr__(self) -> str:
        return f"Result({self.code}, {self.text!r}, {self.error!r})"

    def ok(self) -> str:
        """stdout of a success."""
        assert self.code == 0, self
        return self.text

    def failed(self, words: str, code: int | None = None) -> str:
        """stderr of a failure that says `words`; its code is 1, or 255 where it is an exec that failed."""
        assert self.code == code if code is not None else self.code in (1, 255), self
        assert words in self.error, self
        return self.error


def busybox_root(directory: Path, *, copy: bool = False) -> Path:
    """A root filesystem with busybox and its applets; hard links to one copy below pytest's directory, and to links to
    it: a filesystem without a journal takes ten times as long to find an inode for a new one."""
    directory.mkdir(parents=True)
    for name in ("bin", "dev", "proc", "sys", "tmp", "etc"):
        os.mkdir(f"{directory}/{name}")
    source = _busybox(directory)
    if copy:
        shutil.copy2(source / "busybox", directory / "bin/busybox")
    else:
        os.link(source / "busybox", directory / "bin/busybox")
    for applet in APPLETS:
        os.link(f"{source}/{applet}", f"{directory}/bin/{applet}", follow_symlinks=False)
    (directory / "etc/passwd").write_text(
        "root:x:0:0::/:/bin/sh\n1000:x:0:0::/:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n"
    )
    return directory


def _busybox(directory: Path) -> Path:
    # pytest's directories are /tmp/pytest-of-…/pytest-N/test0/…, or …/pytest/test0/… in hack/test: the copy lies
    # beside the tests of this session.
    above = next((p.parent for p in directory.parents if p.parent.name.startswith("pytest")), directory.parent)
    shared = above / "busybox-shared"
    if not shared.exists():
        temporary = above / f".busybox.{secrets.token_hex(4)}"
        temporary.mkdir()
        shutil.copy2("/bin/busybox", temporary)
        for applet in APPLETS:
            os.symlink("busybox", temporary / applet)
        os.rename(temporary, shared)
    return shared


class Bundle:
    """One bundle, and the container of the same name."""

    def __init__(self, home: Bundles, name: str, args: list[str]) -> None:
        self.home = home
        self.id = name
        self.path = home.directory / name
        self.rootfs = busybox_root(self.path / "rootfs")
        self.config: dict[str, Any] = {
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
            "mounts": json.loads(json.dumps(BASE_MOUNTS)),
            "linux": {
                "cgroupsPath": f"/{home.cgroup}/{name}",
                "namespaces": [{"type": kind} for kind in ALL_NAMESPACES],
            },
        }

    @property
    def process(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["process"]
        return found

    @property
    def linux(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["linux"]
        return found

    def mount(self, destination: str, kind: str, source: object, *options: str) -> Bundle:
        """Adds a mount; the bundle itself."""
        entry = {"destination": destination, "type": kind, "source": str(source), "options": list(options)}
        self.config["mounts"].append(entry)
        return self

    def user_namespace(self, host: int = 100_000, size: int = 65_536) -> Bundle:
        """Maps root and the rest to `host` and above; the rootfs becomes theirs."""
        self.linux["namespaces"].append({"type": "user"})
        for key in ("uidMappings", "gidMappings"):
            self.linux[key] = [{"containerID": 0, "hostID": host, "size": size}]
        for directory, names, files in os.walk(self.rootfs):
            for name in (".", *names, *files):
                os.lchown(os.path.join(directory, name), host, host)
        for above in (self.path, self.home.directory, *self.home.directory.parents):
            if "pytest-" in str(above):
                above.chmod(0o711 | above.stat().st_mode)
        return self

    def write(self) -> Path:
        path = self.path / "config.json"
        path.write_text(json.dumps(self.config))
        return path

    # ------------------------------------------------------------------------------------------------ commands

    def run(self, *flags: str, **changes: Any) -> Result:
        """`ocirun run`, attached."""
        self.write()
        return self.home.ocirun("run", *flags, "--bundle", str(self.path), self.id, **changes)

    def create(self, *flags: str, **changes: Any) -> Result:
        self.write()
        return self.home.ocirun("create", *flags, "--bundle", str(self.path), self.id, **changes)

    def start(self) -> Result:
        return self.home.ocirun("start", self.id)

    def up(self) -> Bundle:
        """Created and started, by one process: those that ask about `create` and `start` call them. The bundle."""
        self.run("--detach").ok()
        return self

    def exec(self, *words: str, flags: tuple[str, ...] = (), **changes: Any) -> Result:
        return self.home.ocirun("exec", *flags, self.id, *words, **changes)

    def delete(self, *, force: bool = True) -> Result:
        return self.home.ocirun("delete", *(["--force"] if force else []), self.id)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.home.ocirun("state", self.id).ok())
        return found

    def status(self) -> str:
        return str(self._known()["status"])

    def pid(self) -> int:
        return int(str(self._known()["pid"]))

    def _known(self) -> dict[str, Any]:
        """What `state` would say, without a process for each time that a test looks whether it is so yet."""
        return self.state() if OCID_RUNTIME else lifecycle.describe(str(self.home.root), self.id)

    def becomes(self, status: str) -> None:
        """Waits until the container's status is that."""
        eventually(lambda: _reap() or self.status() == status, what=f"{self.id} to be {status}")

    def gone(self) -> None:
        """Fails if anything of the container is there: state, cgroup, process or mount."""
        assert not (self.home.root / self.id).exists(), os.listdir(self.home.root / self.id)
        assert self.home.cgroups(self.id) == []
        eventually(lambda: not self.home.processes(self.id), what=f"processes of {self.id} to end")
        assert self.home.mounts() == []


class Bundles:
    """Bundles below one directory, one root of state, one parent of cgroups."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "bundles"
        self.directory.mkdir()
        self.root = directory / "state"
        self.cgroup = f"{CGROUP}-{secrets.token_hex(4)}"
        self.made: list[Bundle] = []
        self._output = directory / "output"
        self._output.mkdir()

    def make(self, *args: str) -> Bundle:
        """A bundle that runs `args`, or sleeps."""
        name = f"c{len(self.made)}-{secrets.token_hex(3)}"
        self.made.append(Bundle(self, name, list(args or ("sleep", "1000"))))
        return self.made[-1]

    def sh(self, script: str) -> Bundle:
        """A bundle that runs a shell script."""
        return self.make("sh", "-c", script)

    def command(self, *words: str) -> list[str]:
        """The command line of `ocirun` with this root."""
        return [OCIRUN, "--root", str(self.root), *words]

    def popen(self, *words: str, env: Mapping[str, str] | None = None, **changes: Any) -> subprocess.Popen[bytes]:
        """`ocirun` with this root; what it is given beyond is Popen's."""
        changes.setdefault("stdin", subprocess.DEVNULL)
        environment = {**os.environ, **(env or {})}
        return awaited(subprocess.Popen(self.command(*words), env=environment, **changes))

    def ocirun(self, *words: str, timeout: float = SOON_S, **changes: Any) -> Result:
        """Runs it to its end."""
        base = self._output / str(next(_numbers))
        with open(f"{base}.out", "wb+") as out, open(f"{base}.err", "wb+") as err:
            changes.setdefault("stdout", out)
            changes.setdefault("stderr", err)
            child = self.popen(*words, **changes)
            try:
                code = _wait(child, timeout)
            except BaseException:
                child.kill()
                child.wait()
                raise
            out.seek(0)
            err.seek(0)
            return Result(code, out.read().decode(errors="replace"), err.read().decode(errors="replace"))

    # --------------------------------------------------------------------------------------------- what is there

    def cgroups(self, name: str = "") -> list[str]:
        """cgroup directories of a container, or of all."""
        found = []
        for top in cgroup_tops():
            with suppress(FileNotFoundError), os.scandir(f"{top}/{self.cgroup}") as entries:
                found += [one.path for one in entries if one.is_dir() and (not name or one.name == name)]
        return found

    def processes(self, name: str = "") -> list[int]:
        """Processes that are in a cgroup of the container, or whose root or command line leads to the test."""
        _reap()
        found = []
        mark = f"{self.cgroup}/{name}".encode()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                try:
                    text = contents(f"/proc/{entry}/cgroup")
                    text += contents(f"/proc/{entry}/cmdline") if not name else b""
                except OSError:
                    continue
                if mark in text or (not name and str(self.root).encode() in text):
                    found.append(int(entry))
        return found

    def mounts(self) -> list[str]:
        return [point.target for point in mountinfo() if point.target.startswith(str(self.directory.parent))]

    def close(self) -> None:
        try:
            for name in sorted(os.listdir(self.root)) if self.root.exists() else ():
                if not name.startswith("."):
                    self._delete(name)
            eventually(lambda: not self.processes(), what="the test's processes to end")
            assert self.cgroups() == [] and self.mounts() == []
        except BaseException:
            take_away(self.cgroup, self.processes, self.mounts)
            raise
        take_away_cgroup(self.cgroup)

    def _delete(self, name: str) -> None:
        """`delete --force`, without a process for each container that a test leaves: tests of `delete` call it."""
        if OCID_RUNTIME or any(one.id == name and one.config.get("hooks") for one in self.made):
            self.ocirun("delete", "--force", name).ok()
            return
        # An init ends after those who have entered its namespace, and who are this process's to wait for.
        before = signal.signal(signal.SIGCHLD, lambda *_: _reap())
        try:
            _reap()
            lifecycle.delete(str(self.root), name, force=True)
        finally:
            signal.signal(signal.SIGCHLD, before)


def _wait(child: subprocess.Popen[bytes], seconds: float) -> int:
    """Its exit code; meanwhile orphans are waited for, as some other process would: an init ends after its children."""
    pidfd = os.pidfd_open(child.pid)
    try:
        end = time.monotonic() + seconds
        while not select.select([pidfd], [], [], 0.1)[0]:
            _reap()
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s: {child.args!r}")
    finally:
        os.close(pidfd)
    code = child.wait()
    _mine.discard(child.pid)
    return code


_mine: set[int] = set()  # what a Popen waits for: waited for by anybody else, it would seem to have ended with 0


def awaited(child: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """A child whose end its test waits for, while orphans of containers are waited for here."""
    _mine.add(child.pid)
    return child


def _reap() -> None:
    """Waits for ended containers that became children of this process."""
    for pid in contents("/proc/thread-self/children").split():
        with suppress(OSError):
            stat = contents(f"/proc/{int(pid)}/stat")
            if stat.rpartition(b")")[2].split()[0] == b"Z" and int(pid) not in _mine:
                os.waitpid(int(pid), os.WNOHANG)


@contextmanager
def bundles(directory: Path) -> Iterator[Bundles]:
    """Bundles that are taken away, and checked, whatever the test does."""
    opened = Bundles(directory)
    set_child_subreaper(True)  # whoever is pid 1 here may take seconds to wait for an orphan
    try:
        yield opened
    except BaseException:
        try:
            opened.close()
        except Exception as error:  # the test's own failure is the one to see
            print(f"clean-up after a failed test: {error!r}")
        raise
    else:
        opened.close()
    finally:
        set_child_subreaper(False)
