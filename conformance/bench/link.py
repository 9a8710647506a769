"""A pull over a simulated line: 100 Mbit/s by tbf on a veth pair, 50 ms each way and random resets by a proxy of ours
(this kernel has no netem).

The image is noise, so that what is downloaded is what is unpacked. The result is the share of what the line carries:
its own rate is measured first, by one connection that does nothing else. Invariant: the namespace at the far end, the
pair and the processes are gone at the end.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conformance import daemons
from conformance.cri_client import connected
from conformance.images.layer import NONE, file, write_layer
from conformance.images.layout import Config, Layout

NEAR, FAR = "10.77.0.1", "10.77.0.2"
RATE = "100mbit"
DELAY_MS = 50
# One connection in the mean carries this much before it is reset.
RESET_MB = 25
SHARES = (0.7, 0.2, 0.1)
MEASURED_S = 3.0
PULL_S = 600.0


@dataclass(frozen=True, slots=True)
class Line:
    """`proxy` and `source` are ports at FAR."""

    proxy: int
    source: int


def image(directory: Path, megabytes: int) -> tuple[Path, int]:
    """A layout with an image of noise called noise:1, and the bytes of its layers."""
    noise = random.Random(77)
    layout = Layout(directory)
    layers = []
    for number, share in enumerate(SHARES):
        files = [file(f"{number}-{part}", noise.randbytes(1_000_000)) for part in range(max(1, int(megabytes * share)))]
        layers.append(write_layer(files, layout.scratch() / str(number), NONE))
    layout.add_image("noise:1", layers, Config(cmd=["none"]))
    layout.finish()
    return directory, sum(layer.size for layer in layers)


@contextmanager
def line(directory: Path, layout: Path) -> Iterator[Line]:
    """The pair, the namespace, and the far side in it."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    inside = ["nsenter", "-t", str(holder.pid), "-n"]
    far = None
    try:
        _wait_for_namespace(holder.pid)
        _do("ip", "link", "add", "bench-near", "type", "veth", "peer", "name", "bench-far")
        _do("ip", "link", "set", "bench-far", "netns", str(holder.pid))
        _do("ip", "address", "add", f"{NEAR}/24", "dev", "bench-near")
        _do("ip", "link", "set", "bench-near", "up")
        _do(*inside, "ip", "address", "add", f"{FAR}/24", "dev", "bench-far")
        for name in ("lo", "bench-far"):
            _do(*inside, "ip", "link", "set", name, "up")
        _do(
            *inside,
            "tc",
            "qdisc",
            "add",
            "dev",
            "bench-far",
            "root",
            "tbf",
            "rate",
            RATE,
            "burst",
            "64kb",
            "latency",
            "50ms",
        )
        words = [str(directory / "far"), FAR, str(DELAY_MS), str(RESET_MB), str(layout)]
        command = [*inside, sys.executable, "-m", "conformance.bench.far_side", *words]
        far = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert far.stdout is not None
        ports = far.stdout.readline().split()
        if len(ports) != 2:
            raise RuntimeError("the far side of the line does not start")
        yield Line(int(ports[0]), int(ports[1]))
    finally:
        if far is not None:
            assert far.stdin is not None
            far.stdin.close()
            far.wait(30)
        holder.kill()
        holder.wait()
        subprocess.run(["ip", "link", "delete", "bench-near"], capture_output=True, check=False)


def _wait_for_namespace(pid: int) -> None:
    ours = Path("/proc/self/ns/net").readlink()
    for _ in range(500):
        if Path(f"/proc/{pid}/ns/net").readlink() != ours:
            return
        time.sleep(0.01)
    raise RuntimeError("unshare makes no network namespace")


def _do(*words: str) -> None:
    subprocess.run(words, check=True)


def carried(port: int) -> float:
    """Bytes per second that one connection gets out of the line."""
    with socket.create_connection((FAR, port), timeout=30) as connection:
        got = 0
        connection.recv(1 << 20)  # what had piled up before the bucket ran
        began = time.perf_counter()
        while time.perf_counter() - began < MEASURED_S:
            got += len(connection.recv(1 << 20))
        return got / (time.perf_counter() - began)


def measure(directory: Path, megabytes: int) -> tuple[float, str]:
    """The share of the line that a pull uses, in percent, and what was measured, in words."""
    layout, size = image(directory / "layout", megabytes)
    with line(directory, layout) as made:
        rate = carried(made.source)
        registry = f"{FAR}:{made.proxy}"
        hosts = directory / "certs.d" / registry
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(f'server = "http://{registry}"\n')
        with daemons.ocid(
            directory / "ocid", bridge="bench1", more=f'[image]\nhosts_dirs = ["{hosts.parent}"]\n'
        ) as one:
            with connected(one.socket) as client:
                began = time.perf_counter()
                client.pull(f"{registry}/noise:1", timeout=PULL_S)
                took = time.perf_counter() - began
    words = f"{size / 1e6:.0f} MB in {took:.1f} s, {size / took / 1e6:.2f} of {rate / 1e6:.2f} MB/s"
    return 100 * size / took / rate, words
