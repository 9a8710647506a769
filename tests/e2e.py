"""A node for end-to-end tests: the installed `ocid serve` with directories, bridge and cgroup of its own, gRPC to its
socket, a registry that can misbehave, and everything a call could leave behind, as one comparable set.

Refuses to fake anything but the registry. Invariant: after `retired` nothing of the node is on the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket as socketlib
import sqlite3
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import grpc

from conformance.cri_client import Cri, Names, connected, container
from conformance.daemons import command_path, remove_cgroup, retire
from conformance.images import layouts
from conformance.leaks import CGROUPS, SPARE, ZYGOTE, Machine
from runtime.linux.mount import mountinfo
from runtime.shim.lingering import PATIENCE
from tests import warm
from tests.fakes.registry import OCI_MANIFEST, BuiltImage, FakeRegistry
from tests.support import eventually, take_away

STOP_S = 20.0
# Files that are there before anything was asked for, and change without telling of anything.
_OWN = (
    "ocid.db",
    "ocid.db-wal",
    "ocid.db-shm",
    ".ocid.db-wal",
    ".ocid.db-shm",
    "lock",
    "ocid.sock",
    "zygote.sock",
    "zygote.lock",
    "zygote.log",
)
_APART = ("fs", "upper", "rootfs", "criu-logs", ".seccomp")
_TABLE = "table inet ocid"
_OF_A_SHIM = " (of a shim)"

CONFIG = """\
[runtime]
cgroup_parent = "/{parent}"
{runtime}
[network]
conf_dir = "{directory}/net.d"
lease_dir = "{directory}/leases"
default_bridge = "{tag}"
default_subnets = ["{subnet}"]
netns_pool = 0
[image]
hosts_dirs = ["{directory}/certs.d"]
unpack_processes = 1
{image}
[limits]
{limits}
"""


def busybox() -> BuiltImage:
    """The busybox image of the demonstration, as a registry of ours serves it."""
    layout = busybox_layout()
    index = json.loads((layout / "index.json").read_bytes())["manifests"][0]

    def blob(digest: str) -> bytes:
        return (layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()

    manifest = json.loads(blob(index["digest"]))
    digests = [manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
    platform = {"os": "linux", "architecture": "amd64"}
    return BuiltImage(
        manifest=blob(index["digest"]),
        media_type=OCI_MANIFEST,
        blobs={digest: blob(digest) for digest in digests},
        config_digest=digests[0],
        layer_digests=tuple(digests[1:]),
        diff_ids=tuple(json.loads(blob(digests[0]))["rootfs"]["diff_ids"]),
        platform=platform,
    )


def busybox_layout() -> Path:
    """The same as a directory; in the virtual machine, which can build none, the one that it was given."""
    if os.environ.get("OCID_VM"):
        (given,) = (Path(__file__).parents[1] / ".cache/images").glob("busybox-*")
        return given
    return layouts(["busybox"])[0]


class Node:
    """One root and one state directory, and the daemon that serves them while `start`ed."""

    def __init__(
        self, directory: Path, *, image: str = "", limits: str = "", runtime: str = "", root: Path | None = None
    ) -> None:
        # Interface names have 15 characters; the second octet keeps test sessions on one machine apart.
        self.tag = f"oe{secrets.token_hex(4)}"
        self.directory = directory
        self.root, self.state = root or directory / "root", directory / "state"
        self.socket, self.log = self.state / "ocid.sock", directory / "ocid.log"
        self.names = Names("e2e", directory / "logs")
        self.process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()
        self._client: Cri | None = None
        self._pods = 0
        self._whole_blobs: set[tuple[object, ...]] = set()  # by all that a change of one changes
        self.image = ""  # for whoever has pulled one
        (directory / "net.d").mkdir(parents=True)
        subnet = f"10.{secrets.choice(range(100, 250))}.{secrets.choice(range(256))}.0/24"
        text = CONFIG.format(
            tag=self.tag,
            parent=f"{self.tag}.slice" if "systemd" in runtime else self.tag,
            directory=directory,
            subnet=subnet,
            image=image,
            limits=limits,
            runtime=runtime,
        )
        (directory / "config.toml").write_text(text)

    # ------------------------------------------------------------------------------------------------------ lifetime

    @property
    def words(self) -> list[str]:
        """`ocid` for this node, to be followed by a command."""
        config = str(self.directory / "config.toml")
        return [command_path("ocid"), "--config", config, "--root", str(self.root), "--state", str(self.state)]

    @property
    def client(self) -> Cri:
        assert self._client is not None, "the daemon is not started"
        return self._client

    def start(self, *, umask: int = -1, as_child: bool = False) -> None:
        """Starts the daemon and waits until it is ready; `as_child` for whoever asks what it has from this process."""
        popen = subprocess.Popen if as_child else warm.Command
        with open(self.log, "ab") as output:
            self.process = popen(
                [*self.words, "serve"],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                umask=umask,
            )
        eventually(lambda: self.process is None or self.process.poll() is not None or self._answers(), what="serving")
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        self._client = self._stack.enter_context(connected(self.socket))

    def _answers(self) -> bool:
        with socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.connect(str(self.socket))
            return True
        return False

    def end(self, number: int = signal.SIGTERM) -> None:
        """Ends the daemon by a signal; pods run on."""
        self._stack.close()
        self._client = None
        if self.process is not None:
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_S)
            finally:
                if self.process.poll() is None:
                    self.process.kill()
                    self.process.wait()
                self.process = None

    @property
    def zygote(self) -> int:
        """The pid of whoever forks the shims (struct ucred of unix(7): pid, uid, gid)."""
        with socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM) as client:
            client.connect(str(self.state / "zygote.sock"))
            raw = client.getsockopt(socketlib.SOL_SOCKET, socketlib.SO_PEERCRED, 12)
            return int(struct.unpack("3i", raw)[0])

    def shim(self, pod: str) -> int:
        """The pid of a pod's shim, by its socket."""
        path = self.state / "pods" / pod / "shim.sock"
        directory = os.open(path.parent, os.O_PATH)
        try:
            with socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM) as client:
                client.connect(f"/proc/self/fd/{directory}/{path.name}")
                raw = client.getsockopt(socketlib.SOL_SOCKET, socketlib.SO_PEERCRED, 12)
                return int(struct.unpack("3i", raw)[0])
        finally:
            os.close(directory)

    # -------------------------------------------------------------------------------------------------------- pods

    def pod_config(self, *, network: bool = False) -> Any:
        """A pod of its own name; on the host's network unless told, since most tests do not ask about it."""
        self._pods += 1
        config = self.names.pod(self._pods)
        if not network:
            config.linux.security_context.namespace_options.network = 2
            config.hostname = ""
        return config

    def run(self, image: str, command: Sequence[str], *, network: bool = False) -> tuple[str, str, Path]:
        """A pod with one started container: pod, container, log file."""
        config = self.pod_config(network=network)
        pod = self.client.run_pod(config)
        one = self.client.create(pod, container("main", image, command), config)
        self.client.start(one)
        return pod, one, Path(config.log_directory) / "main.log"

    def goes_on(self, one: str) -> None:
        """Fails unless the container goes on writing to its log, and can be looked into."""
        log = Path(self.client.status(one).log_path)
        size = log.stat().st_size
        eventually(lambda: log.stat().st_size > size, what="the container to go on")
        assert self.client.exec_sync(one, ["true"])[0] == 0

    def drop(self, pod: str) -> None:
        """Stops and removes a pod with what is in it."""
        self.client.stop_pod(pod)
        self.client.remove_pod(pod)

    def forget(self, reference: str) -> None:
        """Removes an image of one name, and waits for its space: a collector takes it after the call has answered, and
        with it what earlier pulls that failed have left."""
        self.client.remove_image(reference)
        eventually(lambda: not self._garbage(), what=f"what no image needs to go: {self._garbage()}")

    def _garbage(self) -> set[str]:
        """Layers that belong to no image, recorded or on their way out."""
        layers = self.root / "snapshots/layers"
        with self._database() as database:
            rows = dict(database.execute("SELECT chain_id, number FROM snapshotter_layers"))
            images = [id_ for (id_,) in database.execute("SELECT id FROM image")]
        wanted: set[str] = set()
        for id_ in images:
            config = json.loads((self.root / "images/blobs/sha256" / id_.removeprefix("sha256:")).read_bytes())
            diff_ids = config["rootfs"]["diff_ids"]
            wanted.update(accumulate(diff_ids, lambda below, diff: _digest(f"{below} {diff}".encode())))
        found = {chain for chain in rows if chain not in wanted}
        found |= {name for name in os.listdir(layers) if name not in {str(number) for number in rows.values()}}
        return found | set(os.listdir(layers.parent / "trash"))

    # ------------------------------------------------------------------------------------------------------ what is

    def held(self) -> frozenset[str]:
        """Everything this node has on the machine beyond its daemon, in words: files, records, cgroups, mounts,
        processes. A call that fails must leave this as it was."""
        found = {f"file {path}" for path in self._files() if not self._is_kept_blob(path)}
        # Not the node's own parent: it may stay while it is empty.
        for pattern in (f"*/{self.tag}/*/", f"{self.tag}/*/"):
            found |= {f"cgroup {path}" for path in CGROUPS.glob(pattern)}
        machine = Machine.now(shared=False)
        mark = str(self.directory)
        found |= {f"mount {mount}" for mount in machine.mounts if mark in mount}
        ours = {one.pid: one for one in machine.processes if mark in one.command}
        # A zygote has one shim to spare, and its helper: others after each pod, named as it is in their first moment.
        spares = [one for one in ours.values() if one.name == SPARE][:2]
        spares += sorted((one for one in ours.values() if one.name == ZYGOTE), key=lambda one: one.started_ticks)[1:3]
        # A helper may stay for a moment, if another call is likely to follow (runtime/shim/lingering).
        late = (time.clock_gettime(time.CLOCK_BOOTTIME) - 5 * PATIENCE) * os.sysconf("SC_CLK_TCK")
        found |= {
            f"process {one.pid} {one.command[:80]}{_OF_A_SHIM if one.parent in ours else ''}"
            for one in ours.values()
            if (one.parent not in ours or one.started_ticks < late) and one not in spares
        }
        return frozenset(found | set(self._records()))

    def settles(self, before: frozenset[str]) -> None:
        """Fails unless all is as `before` within a moment: a background worker empties the trash."""
        # What was on its way out then: trash, and a helper that took longer over it than it is likely to.
        before = frozenset(one for one in before if "/snapshots/trash/" not in one and not one.endswith(_OF_A_SHIM))
        now = before

        def is_as_before() -> bool:
            nonlocal now
            now = self.held()
            return now == before

        with contextlib.suppress(AssertionError):
            eventually(is_as_before)
        assert now == before, "\n".join(["left:", *sorted(now - before), "gone:", *sorted(before - now)])

    def adds_nothing(self, before: frozenset[str]) -> None:
        """Fails unless there is nothing within a moment that was not there `before`."""
        with contextlib.suppress(AssertionError):
            eventually(lambda: self.held() <= before)
        left = self.held() - before
        assert not left, "\n".join(["left:", *sorted(left)])

    def _files(self) -> Iterator[str]:
        """As text: they are thousands, before and after each test."""
        for top in (self.root, self.state, self.directory / "leases"):
            for directory, directories, files in os.walk(top):
                yield from (f"{directory}/{name}" for name in directories if name != "criu-logs")
                yield from (f"{directory}/{name}" for name in files if name not in _OWN)
                # What is inside a snapshot comes and goes with it; logs and filters are there to stay.
                directories[:] = [name for name in directories if name not in _APART]

    def _is_kept_blob(self, path: str) -> bool:
        """A whole, right blob may stay for the next try; a collector takes it when nobody tries."""
        parent, _, name = path.rpartition("/")
        if parent != f"{self.root}/images/blobs/sha256":
            return path in (f"{self.root}/images/ingest/.collect", f"{self.root}/images/ingest/.reserve")
        try:
            status = os.stat(path)
            known = (path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if known not in self._whole_blobs:  # megabytes, which are looked at before and after each test
                if hashlib.sha256(Path(path).read_bytes()).hexdigest() != name:
                    return False
                self._whole_blobs.add(known)
        except FileNotFoundError:
            pass
        return True

    def _records(self) -> Iterator[str]:
        with self._database() as database:
            tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            # Where an image came from goes when its last name does: the database sees to it (imagestore/origins.py).
            for table in set(tables) - {"image_origin"}:
                for row in database.execute(f"SELECT * FROM {table}"):
                    yield f"record {table}: {str(row)[:200]}"

    def _database(self) -> contextlib.closing[sqlite3.Connection]:
        return contextlib.closing(sqlite3.connect(f"file:{self.root}/ocid.db?mode=ro", uri=True))


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@contextmanager
def node(
    directory: Path, *, image: str = "", limits: str = "", runtime: str = "", root: Path | None = None
) -> Iterator[Node]:
    """A started node; everything of it is gone afterwards."""
    before = Machine.now()
    made = Node(directory, image=image, limits=limits, runtime=runtime, root=root)
    with ExitStack() as undo:
        undo.callback(retired, made, before)
        undo.push(lambda kind, *_: discard(made) if kind else None)
        try:
            made.start()
            yield made
        finally:
            with contextlib.suppress(AssertionError, grpc.RpcError):
                if made.process is None:
                    made.start()
                made.client.clear()
            made.end()


def discard(made: Node) -> None:
    """Takes away by force what a node has left whose test has failed: its daemon may not be able to."""

    def processes() -> list[int]:
        mark = str(made.directory)
        found = {one.pid for one in Machine.now(shared=False).processes if mark in one.command and not one.ended}
        for pattern in (f"*/{made.tag}/**/cgroup.procs", f"{made.tag}/**/cgroup.procs"):
            for path in CGROUPS.glob(pattern):
                with contextlib.suppress(OSError):
                    found.update(map(int, path.read_text().split()))
        return sorted(found - {os.getpid()})

    def mounts() -> list[str]:
        return [one.target for one in mountinfo() if one.target.startswith(f"{made.state}/")]

    retire(made.state)
    take_away(made.tag, processes, mounts)


def retired(made: Node, before: Machine) -> None:
    """Takes away what a node keeps for as long as it lives: zygote, bridge, empty cgroups; and the table when this
    machine is ours alone."""
    retire(made.state)
    remove_cgroup(made.tag)
    subprocess.run(["ip", "link", "delete", made.tag], capture_output=True, check=False)
    if _TABLE not in before.tables and os.environ.get("OCID_REQUIRE_ALL"):
        drop_table()


def drop_table() -> None:
    """What a node keeps of nftables, on a machine that is ours alone."""
    subprocess.run(["nft", *f"delete {_TABLE}".split()], capture_output=True, check=False)


@contextmanager
def stocked() -> Iterator[FakeRegistry]:
    """A registry with `busybox:1`."""
    with FakeRegistry() as registry:
        registry.add("busybox", "1", busybox())
        yield registry


def named_log(said: str) -> Path:
    """The log that an error of criu's names."""
    return Path(said.partition("log file: ")[2].split(" (hint")[0])


@contextmanager
def seasoned(directory: Path, registry: FakeRegistry, *, limits: str = "") -> Iterator[Node]:
    """A node that has an image and has run a pod: zygote, bridge and the cached seccomp program stay."""
    with node(directory, limits=limits) as made:
        made.image = f"{registry.name}/busybox:1"
        made.client.pull(made.image)
        made.drop(made.run(made.image, ["true"], network=True)[0])
        yield made


@contextmanager
def borrowed(made: Node) -> Iterator[Node]:
    """A node that several tests use, for one of them: what it has left goes, and nothing else is there then."""
    before = made.held()
    yield made
    made.client.clear()
    made.settles(before)


@contextmanager
def unchanged(made: Node) -> Iterator[Node]:
    """A node for a test that may end its daemon. Afterwards there is one, and all is as before, processes aside, which
    differ from start to start."""

    def held() -> set[str]:
        return {thing for thing in made.held() if not thing.startswith("process ")}

    before = held()
    try:
        yield made
    finally:
        if made.process is None or made.process.poll() is not None:
            made.end()
            made.start()
        made.client.clear()
    with contextlib.suppress(AssertionError):
        eventually(lambda: held() == before)
    now = held()
    assert now == before, "\n".join(["left:", *sorted(now - before), "gone:", *sorted(before - now)])


@contextmanager
def lent(made: Node) -> Iterator[Node]:
    """The same for one of several tests. Between them the node has no daemon: a later one is another process, which a
    test must not leave."""
    made.start()
    try:
        with unchanged(made):
            yield made
    finally:
        made.end()


def messages(log: Path, stream: str = "stdout") -> list[str]:
    """What a container printed, out of a log in the CRI's format."""
    lines = log.read_text().splitlines() if log.exists() else []
    split = [line.split(" ", 3) for line in lines]
    return [words[3] for words in split if words[1] == stream]
