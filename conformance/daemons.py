"""Starts the runtimes that are compared, each with root, state, socket and network of its own below one directory, and
stops them by their pid.

`ocid` is started as a user would; `containerd` is Debian's, with its runc and the reference CNI plugins, set up to do
the same work: a bridge with masquerading, overlay snapshots, images over plain HTTP from loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket as socketlib
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conformance.leaks import CGROUPS

STOP_S = 20.0
PLUGINS = Path("/usr/lib/cni")


@dataclass(frozen=True, slots=True)
class Daemon:
    """A runtime that serves CRI at `socket`; `bridge` is the link its pods hang on."""

    name: str
    socket: Path
    pid: int
    directory: Path
    log: Path
    bridge: str


def conflist(name: str, bridge: str, subnet: str, leases: Path) -> str:
    """One network as a node has it: bridge, addresses by host-local, masquerading, host ports."""
    plugins = [
        {
            "type": "bridge",
            "bridge": bridge,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(leases),
                "ranges": [[{"subnet": subnet}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    return json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": plugins}, indent=1)


@contextmanager
def _running(name: str, command: list[str], directory: Path, socket: Path, bridge: str) -> Iterator[Daemon]:
    log = directory / f"{name}.log"
    with open(log, "ab") as output:
        # A session of its own: ^C on the terminal is for us, who then stop it in order.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        _wait_for_socket(process, socket, log)
        yield Daemon(name, socket, process.pid, directory, log, bridge)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True, check=False)


def _wait_for_socket(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    deadline = time.monotonic() + 30
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} does not serve {socket}: {log.read_text()[-2000:]}")
        time.sleep(0.01)


def command_path(name: str) -> str:
    """`ocid` or `ocirun` of this very environment."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


def ocid_command(
    directory: Path,
    subnet: str = "10.201.0.0/16",
    bridge: str = "",
    handlers: Mapping[str, str] | None = None,
    more: str = "",
    state: Path | None = None,
) -> tuple[list[str], Path]:
    """What starts `ocid serve` below `directory`, and its socket; with a `bridge` its network comes from a conflist,
    else from its own default. `handlers` are further ones, by name; `more` is added to the configuration; `state` is
    elsewhere than below `directory`."""
    root, state, networks = directory / "root", state or directory / "state", directory / "net.d"
    networks.mkdir(parents=True, exist_ok=True)
    if bridge:
        (networks / "10-pods.conflist").write_text(conflist("pods", bridge, subnet, directory / "leases"))
    configuration = directory / "config.toml"
    configuration.write_text(
        f'[network]\nconf_dir = "{networks}"\nlease_dir = "{directory}/leases"\ndefault_subnets = ["{subnet}"]\n'
        "[runtime.handlers]\n" + "".join(f'{name} = "{path}"\n' for name, path in (handlers or {}).items()) + more
    )
    command = [command_path("ocid"), "--config", str(configuration), "--root", str(root), "--state", str(state)]
    return [*command, "serve"], state / "ocid.sock"


@contextmanager
def ocid(
    directory: Path, subnet: str = "10.201.0.0/16", bridge: str = "", more: str = "", state: Path | None = None
) -> Iterator[Daemon]:
    """`ocid serve` below `directory`, as `ocid_command` has it."""
    command, socket = ocid_command(directory, subnet, bridge, more=more, state=state)
    try:
        with _running("ocid", command, directory, socket, bridge or "ocid0") as daemon:
            yield daemon
    finally:
        retire(socket.parent)


def retire(state: Path) -> None:
    """Takes away what ocid keeps for its next start: the zygote of a state directory, the mount that namespaces are
    pinned in, and cgroups that are empty. A node does this by rebooting."""
    with contextlib.suppress(OSError), socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM) as client:
        client.connect(str(state / "zygote.sock"))
        # struct ucred of unix(7): pid, uid, gid of whoever listens.
        pid = struct.unpack("3i", client.getsockopt(socketlib.SOL_SOCKET, socketlib.SO_PEERCRED, 12))[0]
        handle = os.pidfd_open(pid)
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], STOP_S)
        os.close(handle)
    _see_out(state)
    subprocess.run(["umount", state / "netns"], capture_output=True, check=False)
    for name in ("ocid", "ocid.shims"):
        # Not what is below: a cgroup there may be one that somebody else's container is about to enter.
        for top in [CGROUPS, *CGROUPS.iterdir()]:
            with contextlib.suppress(OSError):
                os.rmdir(top / name)


def _see_out(state: Path) -> None:
    """Waits for forks of the zygote that have a connection, ours from above for one: they are in the shims' cgroup."""
    words = os.fsencode(f"zygote\0{state}\0")
    deadline = time.monotonic() + STOP_S
    while any(_answers(pid, words) for pid in _shims()) and time.monotonic() < deadline:
        select.select([], [], [], 0.002)


def _shims() -> set[str]:
    found: set[str] = set()
    for top in CGROUPS.iterdir():
        with contextlib.suppress(OSError):
            found.update((top / "ocid.shims/cgroup.procs").read_text().split())
    return found


def _answers(pid: str, words: bytes) -> bool:
    """Whether that is such a fork; one that has let go of its memory has no command line any more."""
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        name = Path(f"/proc/{pid}/comm").read_text()
        return name in ("ocid-zygote\n", "ocid-spare\n") and (not line or line.endswith(words))
    return False


CONTAINERD = """\
version = 2
root = "{directory}/root"
state = "{state}"
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{directory}/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "{runtime}"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{directory}/certs.d"
"""


@contextmanager
def containerd(
    directory: Path,
    registry: str,
    subnet: str = "10.202.0.0/16",
    bridge: str = "peer0",
    runtime: str = "runc",
    pause: str = "",
    state: Path | None = None,
) -> Iterator[Daemon]:
    """Debian's containerd below `directory`, with the pause image from `registry` ("host:port") unless another is
    named; `runtime` is the binary that its shims call; `state` is elsewhere than below `directory`."""
    networks, hosts = directory / "net.d", directory / "certs.d" / registry
    networks.mkdir(parents=True, exist_ok=True)
    hosts.mkdir(parents=True, exist_ok=True)
    (networks / "10-pods.conflist").write_text(conflist("peers", bridge, subnet, directory / "leases"))
    (hosts / "hosts.toml").write_text(f'server = "http://{registry}"\n[host."http://{registry}"]\n')
    socket = directory / "containerd.sock"
    configuration = directory / "config.toml"
    configuration.write_text(
        CONTAINERD.format(
            directory=directory,
            state=state or directory / "state",
            socket=socket,
            pause=pause or f"{registry}/pause:1",
            plugins=PLUGINS,
            runtime=runtime,
        )
    )
    command = ["containerd", "--config", str(configuration), "--log-level", "warn"]
    with _running("containerd", command, directory, socket, bridge) as daemon:
        yield daemon


def remove_cgroup(name: str) -> None:
    """Removes the (by now empty) cgroup `name` of every hierarchy; what holds a process stays and is found later."""
    for top in [CGROUPS, *CGROUPS.iterdir()]:
        for directory, _, _ in os.walk(top / name, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def pss_bytes(pid: int) -> int:
    """A process's proportional share of memory; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as handle:
            for line in handle:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def all_pids() -> frozenset[int]:
    return frozenset(int(name) for name in os.listdir("/proc") if name.isdigit())
