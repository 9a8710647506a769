"""Pods and busybox containers for tests of the shim, and proof that nothing of them is left.

`Pod` drives `Shims` as the daemon would; `Machine` compares mounts, processes, cgroups and files before and after. A
`Home` is what labs share, as the pods of a node do: a zygote takes longer to start than most tests take.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from conformance.leaks import contents
from runtime.linux.mount import FsMount, mountinfo
from runtime.linux.process import is_running
from runtime.linux.sockets import connect_unix, recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.cgroup import SPARE
from runtime.shim.client import Shims
from runtime.shim.model import ContainerFacts, ContainerSpec, ExecResult, ExecSpec, Sandbox, SandboxSpec
from tests.support import SOON_S, cgroup_tops, eventually, take_away, take_away_cgroup

RUNC = shutil.which("runc") or "/usr/sbin/runc"
CAPABILITIES = ["CAP_KILL", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE", "CAP_SYS_CHROOT"]
LINE = re.compile(rb"(\S+) (stdout|stderr) ([PF]) ([^\n]*)\n")


def busybox_root(directory: Path) -> Path:
    """A root filesystem with busybox and its applets."""
    root = directory / "busybox"
    for name in ("bin", "dev", "proc", "sys", "tmp", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy2("/bin/busybox", root / "bin/busybox")
    applets = "sh cat echo sleep true false seq yes head ls kill setsid env id mount stty dd ps wc printf test tr rm"
    for applet in applets.split():
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    return root


def process(args: Sequence[str], *, terminal: bool = False, env: Sequence[str] = ()) -> dict[str, object]:
    """A runtime-spec process object."""
    sets = ("bounding", "effective", "permitted")
    return {
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": ["PATH=/bin", "HOME=/", *env],
        "cwd": "/",
        "capabilities": dict.fromkeys(sets, CAPABILITIES),
        "noNewPrivileges": True,
    }


class Pod:
    """One sandbox and its containers under a directory of the test's."""

    def __init__(self, shims: Shims, directory: Path, root: Path, handler: str, cgroup: str) -> None:
        self.shims = shims
        self.directory = directory
        self.id = directory.name
        self.handler = handler
        self._root = root
        self._cgroup = cgroup
        self._sandbox: Sandbox | None = None

    @property
    def sandbox(self) -> Sandbox:
        assert self._sandbox is not None, "the pod was not started"
        return self._sandbox

    def start(self, **changes: object) -> Sandbox:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        values: dict[str, object] = {"hostname": "shimtest", "netns": None, "shm_bytes": 1 << 20, **changes}
        spec = SandboxSpec(id=self.id, directory=self.directory, **values)  # type: ignore[arg-type]
        self._sandbox = self.shims.start(spec)
        return self._sandbox

    def bundle(self, name: str) -> Path:
        return self.directory / name

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def spec(
        self,
        name: str,
        args: Sequence[str],
        *,
        terminal: bool = False,
        config: Mapping[str, object] | None = None,
        linux: Mapping[str, object] | None = None,
        log: bool = True,
        **changes: object,
    ) -> ContainerSpec:
        """Writes the bundle of a container that runs `args` and describes it."""
        bundle = self.bundle(name)
        for part in ("upper", "work"):
            (bundle / part).mkdir(parents=True, exist_ok=True)
        namespaces = [{"type": "mount"}, {"type": "pid"}, {"type": "network"}]
        namespaces += [{"type": kind, "path": f"{self.directory}/ns/{kind}"} for kind in ("ipc", "uts")]
        document = {
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": process(args, terminal=terminal),
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {
                    "destination": "/dev/pts",
                    "type": "devpts",
                    "source": "devpts",
                    "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
                },
                {"destination": "/dev/shm", "type": "bind", "source": f"{self.directory}/shm", "options": ["bind"]},
            ],
            "linux": {"cgroupsPath": f"/{self._cgroup}/{self.id}-{name}", "namespaces": namespaces, **(linux or {})},
            **(config or {}),
        }
        (bundle / "config.json").write_text(json.dumps(document))
        options = (("lowerdir", str(self._root)), ("upperdir", f"{bundle}/upper"), ("workdir", f"{bundle}/work"))
        return ContainerSpec(
            id=f"{self.id}-{name}",
            bundle=bundle,
            rootfs=FsMount("overlay", "overlay", options),
            log_path=self.log(name) if log else None,
            terminal=terminal,
            handler=self.handler,
            **changes,  # type: ignore[arg-type]
        )

    def create(self, name: str, args: Sequence[str], **changes: object) -> str:
        """A created container; its id."""
        spec = self.spec(name, args, **changes)  # type: ignore[arg-type]
        self.shims.create(self.sandbox, spec)
        return spec.id

    def run(self, name: str, args: Sequence[str], **changes: object) -> str:
        """A started container; its id."""
        container = self.create(name, args, **changes)
        self.shims.start_container(self.sandbox, container)
        return container

    def facts(self, container: str) -> ContainerFacts:
        found = self.shims.reconnect(self.sandbox)
        assert found is not None, "the shim is gone"
        return next(facts for facts in found if facts.id == container)

    def ended(self, container: str, seconds: float = SOON_S) -> ContainerFacts:
        """The facts of the container once it has ended."""
        eventually(lambda: self.facts(container).finished_ns, seconds, f"{container} to end")
        return self.facts(container)

    def exec(self, container: str, args: Sequence[str], **changes: object) -> ExecResult:
        return self.shims.exec_sync(self.sandbox, container, ExecSpec(process(args), **changes))  # type: ignore[arg-type]

    def entries(self, name: str) -> list[tuple[bytes, bytes, bytes]]:
        """(stream, tag, text) of every log line; fails on anything else."""
        return entries(self.log(name))

    def lines(self, name: str, stream: bytes = b"stdout") -> list[bytes]:
        return [text for found, _, text in self.entries(name) if found == stream]

    def stop(self) -> None:
        if self._sandbox is not None:
            self.shims.stop(self._sandbox)
            self._sandbox = None


def entries(path: Path) -> list[tuple[bytes, bytes, bytes]]:
    raw, position, found = path.read_bytes(), 0, []
    while position < len(raw):
        match = LINE.match(raw, position)
        assert match, raw[position : position + 80]
        found.append((match[2], match[3], match[4]))
        position = match.end()
    return found


def kill(sandbox: Sandbox) -> None:
    """SIGKILL for a shim, and waits until it is dead."""
    assert is_running(sandbox.pid, sandbox.started_ticks)
    os.kill(sandbox.pid, signal.SIGKILL)
    eventually(lambda: not is_running(sandbox.pid, sandbox.started_ticks), what="the shim to die")


class Machine:
    """What a test may leave nothing of: mounts below a directory, processes that name it, cgroups of its name."""

    def __init__(self, directory: Path, cgroup: str, forks: Callable[[], list[int]]) -> None:
        self._directory = str(directory)
        self._forks = forks
        self.cgroup = cgroup

    def mounts(self) -> list[str]:
        return [point.target for point in mountinfo() if point.target.startswith(self._directory)]

    def cgroups(self) -> list[str]:
        found = []
        for top in cgroup_tops():
            with contextlib.suppress(FileNotFoundError), os.scandir(f"{top}/{self.cgroup}") as entries:
                found += [one.path for one in entries if one.is_dir()]
        return sorted(found)

    def processes(self) -> list[int]:
        """Processes whose command line or cgroup leads to the test, and the forks of a zygote that it shares."""
        return sorted({*_named(self._directory, self.cgroup), *self._forks()})


def _named(*names: str) -> list[int]:
    """Processes with one of these in their command line or among their cgroups."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                text = contents(f"/proc/{entry}/cmdline") + contents(f"/proc/{entry}/cgroup")
            except OSError:
                continue
            if any(os.fsencode(name) in text for name in names):
                found.append(int(entry))
    return found


def _is_spare(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text() == f"{SPARE}\n"
    return False


class Home:
    """A state directory with a zygote, if there is one, and a root filesystem that nobody writes to."""

    def __init__(self, directory: Path, *, direct: bool = False) -> None:
        self.state = directory / "state"
        self.state.mkdir(mode=0o700)
        self.root = busybox_root(directory)
        self.numbers = count()
        self.serving = 0  # the pid of a zygote that labs share
        self._direct = direct

    def shims(self) -> Shims:
        """A client that knows nothing but the state directory, as a daemon's that has just started."""
        return Shims(self.state, direct=self._direct)

    def zygote(self) -> int:
        """The pid of the zygote."""
        with connect_unix(self.state / "zygote.sock", 5.0) as connection:
            send_frame(connection, protocol.request("hello"))
            received = recv_frame(connection)
            assert received is not None
            return int(protocol.parse_reply(received[0])["pid"])

    def forks(self) -> list[int]:
        """What a zygote that is shared has made, which has its command line and names no test; not the shim, and its
        helper, that it has to spare."""
        if not self.serving:
            return []
        made = [pid for pid in _named(str(self.state)) if pid != self.serving]
        spare = [pid for pid in made if _is_spare(pid)]
        return [pid for pid in made if pid not in spare] + spare[2:]


@contextmanager
def home(directory: Path) -> Iterator[Home]:
    """A Home that labs share; nothing of it is left."""
    made = Home(directory)
    shims = made.shims()
    shims.prepare()
    try:
        made.serving = made.zygote()
        yield made
    finally:
        shims.end_zygote()
    eventually(lambda: not _named(str(made.state)), what="the zygote and its forks to end")


class Lab:
    """Pods in a state directory, of its own or shared, and at the end nothing of them."""

    def __init__(self, directory: Path, handler: str, *, direct: bool = False, shared: Home | None = None) -> None:
        self.directory = directory
        self.home = shared or Home(directory, direct=direct)
        self.state = self.home.state
        self.shims = self.home.shims()
        self.handler = {"native": "", "runc": RUNC}[handler]
        self.machine = Machine(directory, f"ocid-test-{secrets.token_hex(4)}", self.home.forks)
        self.pods: list[Pod] = []
        (directory / "pods").mkdir(mode=0o700)

    def pod(self, *, start: bool = True, **changes: object) -> Pod:
        """A further pod, started unless told otherwise."""
        directory = self.directory / "pods" / f"pod{next(self.home.numbers)}"
        pod = Pod(self.shims, directory, self.home.root, self.handler, self.machine.cgroup)
        self.pods.append(pod)
        if start:
            pod.start(**changes)
        return pod

    def adopt(self, sandbox: Sandbox) -> Pod:
        """A pod that somebody else has started and stops, to write bundles for."""
        pod = Pod(self.shims, sandbox.directory, self.home.root, self.handler, self.machine.cgroup)
        pod._sandbox = sandbox
        return pod

    def restarted(self) -> Shims:
        """The client of a daemon that has just started."""
        self.shims = self.home.shims()
        for pod in self.pods:
            pod.shims = self.shims
        return self.shims

    def zygote(self) -> int:
        """The pid of the zygote."""
        return self.home.zygote()

    def close(self) -> None:
        # Each of it happens whatever becomes of the others.
        with ExitStack() as undo:
            undo.push(self._take_away)
            undo.callback(self._check)
            if not self.home.serving:
                undo.callback(self.shims.end_zygote)
            for pod in reversed(self.pods):
                undo.callback(pod.stop)

    def _check(self) -> None:
        assert self.machine.mounts() == []
        assert self.machine.cgroups() == []
        eventually(lambda: not self.machine.processes(), what="the test's processes to end")

    def _take_away(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed:
            take_away(self.machine.cgroup, self.machine.processes, self.machine.mounts)
        else:
            take_away_cgroup(self.machine.cgroup)  # there is nothing else, as was just looked


@contextmanager
def lab(directory: Path, handler: str = "native", *, direct: bool = False, shared: Home | None = None) -> Iterator[Lab]:
    """A Lab that is closed, and checked, whatever the test does."""
    opened = Lab(directory, handler, direct=direct, shared=shared)
    try:
        yield opened
    except BaseException:
        for pod in opened.pods:
            log = pod.directory / "shim.log"
            if log.exists():
                print(log, log.read_text())
        try:
            opened.close()
        except Exception as error:  # the test's own failure is the one to see
            print(f"clean-up after a failed test: {error!r}")
        raise
    opened.close()
