"""`make run`: from a registry image to a supervised pod, and the same image without a daemon. Everything is real: a
registry on loopback, `ocid serve`, calls over CRI, the pod's address, and at the end nothing is left.

Each step checks what it claims and prints how long it took; the first that fails ends the run with exit code 1, after
the cleaning up.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from conformance import daemons
from conformance.cri_client import Cri, Names, connected, container
from conformance.daemons import Daemon, command_path
from conformance.images import BUSYBOX, layouts, push
from conformance.images.recipes import PAGE
from conformance.leaks import Machine, left_over
from conformance.registry import Registry, registry

WAIT_S = 20.0
SETTLE_S = 5.0
COMMAND_S = 60.0
# A process that belongs to this run carries this in its environment, whoever its parent is by now.
MARK = "OCID_DEMO"
TABLE, LEASES = "table inet ocid", Path("/var/lib/cni/networks")
FETCHER = 'echo "fetching from $(hostname)"; until wget -q -O- http://127.0.0.1/; do sleep 0.1; done; exec sleep 3600'


FAILURES = (grpc.RpcError, OSError, RuntimeError, TimeoutError, subprocess.SubprocessError)


class StepFailed(RuntimeError):
    """A step did not do what it claims: one sentence with what was seen."""


@dataclass(slots=True)
class Demonstration:
    """Prints steps with their time since the start; `indent` lines are what a step has to show."""

    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        started = time.perf_counter()
        print(f"[{started - self.began:6.2f} s] {title}", flush=True)
        yield
        print(f"            done in {(time.perf_counter() - started) * 1000:.0f} ms", flush=True)

    def show(self, text: str) -> None:
        for line in text.rstrip().splitlines():
            print(f"            {line}", flush=True)


def expect(condition: object, what: str) -> None:
    if not condition:
        raise StepFailed(what)


def eventually(probe: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise StepFailed(f"not within {WAIT_S:.0f} s: {what}")
        time.sleep(0.02)
    return value


def http_get(address: str, port: int = 80) -> str:
    connection = http.client.HTTPConnection(address, port, timeout=2)
    try:
        connection.request("GET", "/")
        reply = connection.getresponse()
        return f"{reply.status} {reply.read().decode()}"
    except OSError:
        return ""
    finally:
        connection.close()


def messages(log: Path, stream: str = "stdout") -> list[str]:
    """What a container printed, out of a log file in CRI's format."""
    found = []
    for line in log.read_text().splitlines() if log.exists() else []:
        _, name, _, text = line.split(" ", 3)
        if name == stream:
            found.append(text)
    return found


def stock(demo: Demonstration, images: Registry) -> None:
    with demo.step("fill a registry on loopback with images made of Debian packages"):
        for layout in layouts():
            for reference in push(layout, images.address):
                demo.show(reference)


def pods(demo: Demonstration, images: Registry, daemon: Daemon, client: Cri, base: Path) -> None:
    """The CRI half: two containers in one pod, used and taken down again."""
    name, version = client.version()
    demo.show(f"{name} {version} serves {daemon.socket}: {client.conditions()}")
    nginx, busybox = images.reference("nginx:1"), images.reference(BUSYBOX)
    with demo.step("pull nginx (a gzip, a zstd and a plain layer) and busybox"):
        for image in (nginx, busybox):
            demo.show(f"{image} → {client.pull(image)}")
        tags = [tag for image in client.list_images() for tag in image.repo_tags]
        expect({nginx, busybox} <= set(tags), f"ListImages shows only {tags}")

    config = Names("demo", base / "logs").pod("web")
    logs = Path(config.log_directory)
    with demo.step("run a pod with two containers: nginx, and a busybox that fetches from it over localhost"):
        pod = client.run_pod(config)
        server = client.create(pod, container("nginx", nginx), config)
        client.start(server)
        fetcher = client.create(pod, container("fetch", busybox, ["sh", "-c", FETCHER]), config)
        client.start(fetcher)
        states = {one.metadata.name: one.state for one in client.list_containers()}
        expect(set(states.values()) == {1}, f"not all containers run: {states}")

    with demo.step("ask the pod's address over HTTP"):
        address = client.pod_status(pod).network.ip
        answer = eventually(lambda: http_get(address), f"http://{address}/ answers")
        expect(answer == f"200 {PAGE}", f"http://{address}/ answers {answer!r}")
        demo.show(f"http://{address}/ → {answer}")

    with demo.step("run commands in the containers"):
        code, output, errors = client.exec_sync(fetcher, ["sh", "-c", "hostname; id -un; ip -o -4 addr show eth0"])
        expect(code == 0 and output.startswith(b"demo-web\nroot\n"), f"exec: {code} {output!r} {errors!r}")
        expect(address.encode() in output, f"eth0 of the pod does not have {address}: {output!r}")
        demo.show(output.decode())
        code, _, _ = client.exec_sync(fetcher, ["sh", "-c", "exit 42"])
        expect(code == 42, f"exit 42 comes back as {code}")

    with demo.step("read the logs"):
        page = PAGE.splitlines()[-1]
        seen = eventually(lambda: [line for line in messages(logs / "fetch.log") if page in line], "the page is logged")
        demo.show(f"fetch: {seen[0]}")
        hits = eventually(lambda: [x for x in messages(logs / "nginx.log") if '"GET / ' in x], "nginx logs requests")
        demo.show(f"nginx: {hits[-1]}")

    with demo.step("measure the containers"):
        for one, label in ((server, "nginx"), (fetcher, "fetch")):
            stats = client.stats(one)
            used, spent = stats.memory.working_set_bytes.value, stats.cpu.usage_core_nano_seconds.value
            expect(used > 0 and spent > 0, f"stats of {label}: {stats}")
            demo.show(f"{label}: {used / 2**20:.1f} MiB, {spent / 1e6:.1f} ms of CPU")

    with demo.step("stop and remove the pod"):
        client.stop(server, grace_s=5)
        status = client.status(server)
        expect(status.exit_code == 0, f"nginx exits with {status.exit_code} on its own stop signal")
        client.stop(fetcher, grace_s=1)
        for one in (server, fetcher):
            client.remove(one)
        client.stop_pod(pod)
        client.remove_pod(pod)
        expect(not client.list_pods() and not client.list_containers(), "something is still listed")
        expect(not http_get(address), f"http://{address}/ still answers")


class CommandLine:
    """`ocid` with a root and state of its own, where no daemon serves."""

    def __init__(self, directory: Path) -> None:
        self._words = [command_path("ocid"), "--root", str(directory / "root"), "--state", str(directory / "state")]

    def __call__(self, *words: str, code: int = 0) -> str:
        result = subprocess.run(
            [*self._words, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if result.returncode != code:
            said = (result.stderr or result.stdout).strip()
            raise StepFailed(f"ocid {' '.join(words)}: exit code {result.returncode}, not {code}: {said}")
        return result.stdout.strip()


def without_daemon(demo: Demonstration, images: Registry, base: Path) -> None:
    """The other half: the same image by one command."""
    ocid, image = CommandLine(base / "alone"), images.reference(BUSYBOX)
    with demo.step("ocid run, without a daemon and without configuration"):
        output = ocid("run", "--rm", image, "sh", "-c", "echo hello from $(id -un), pid $$")
        expect(output.endswith("hello from root, pid 1"), f"it prints {output!r}")
        demo.show(output)
        ocid("run", "--rm", image, "sh", "-c", "exit 7", code=7)
        demo.show("an exit code of 7 is passed on")
    with demo.step("ocid run -d, ps, exec, logs, stop, rm"):
        ocid("run", "-d", "--name", "web", image, "sh", "-c", "echo serving; exec httpd -f -p 80 -h /www")
        try:
            expect("web" in ocid("ps"), "ocid ps does not show it")
            page = eventually(lambda: _fetch(ocid), "the page, fetched inside")
            expect(PAGE.strip() in page, f"the page fetched inside is {page!r}")
            expect("serving" in ocid("logs", "web"), "ocid logs does not show what it printed")
            demo.show(ocid("ps"))
            ocid("stop", "--time", "1", "web")
        finally:
            ocid("rm", "-f", "web")
        expect("web" not in ocid("ps", "-a"), "ocid ps -a still shows it")


def _fetch(ocid: CommandLine) -> str:
    try:
        return ocid("exec", "web", "wget", "-q", "-O-", "http://127.0.0.1/")
    except StepFailed:
        return ""


def networks() -> dict[str, str]:
    """Bridges by network: ocid's default one, and those of the machine's own configuration, such as Debian's podman
    brings along: `ocid run` takes the first of these."""
    found = {"ocid": "ocid0"}
    for file in Path("/etc/cni/net.d").glob("*.conflist"):
        document = json.loads(file.read_text())
        for plugin in document["plugins"]:
            if plugin["type"] == "bridge":
                found[document["name"]] = plugin.get("bridge", "cni0")
    return found


def take_away_node(before: Machine) -> None:
    """Removes what stays by design as long as a node lives, if this run brought it: bridges, table, leases' places."""
    now = Machine.now()
    if TABLE in now.tables - before.tables:
        subprocess.run(["nft", *f"delete {TABLE}".split()], capture_output=True, check=False)
    for name, bridge in networks().items():
        if bridge not in now.links - before.links:
            continue
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True, check=False)
        for file in ("lock", "last_reserved_ip.0"):
            (LEASES / name / file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (LEASES / name).rmdir()


def leftovers(before: Machine, marks: Sequence[str]) -> list[str]:
    deadline = time.monotonic() + SETTLE_S
    while True:
        found = left_over(before, Machine.now(), marks)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def unmount_below(directory: str) -> None:
    """Only after leftovers were counted: so that removing the directory cannot reach into what is mounted there."""
    points = [mount.split(" (")[0] for mount in Machine.now().mounts]
    for point in sorted((one for one in points if one.startswith(directory)), reverse=True):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)


def explain(error: Exception, log: Path) -> str:
    text = str(error.details()) if isinstance(error, grpc.RpcError) else str(error)
    return f"{text}\n--- the end of {log.name}:\n{log.read_text()[-3000:]}" if log.exists() else text


def perform(demo: Demonstration, base: Path) -> None:
    with ExitStack() as stack:
        images = stack.enter_context(registry(base / "registry"))
        stock(demo, images)
        with demo.step("start ocid serve"):
            (base / "serve").mkdir()
            serving = stack.enter_context(ExitStack())
            daemon = serving.enter_context(daemons.ocid(base / "serve"))
            client = serving.enter_context(connected(daemon.socket))
            serving.callback(client.clear)
        pods(demo, images, daemon, client, base)
        serving.close()
        stack.callback(daemons.retire, base / "alone" / "state")
        without_daemon(demo, images, base)


def main() -> int:
    if os.geteuid() != 0:
        print("make run: containers need root", file=sys.stderr)
        return 1
    os.environ[MARK] = str(os.getpid())
    demo = Demonstration()
    before = Machine.now()
    failure = ""
    directory = tempfile.mkdtemp(prefix="ocid-demo-")
    base = Path(directory)
    try:
        perform(demo, base)
    except FAILURES as error:
        failure = explain(error, base / "serve" / "ocid.log")
    finally:
        take_away_node(before)
        # On a machine that is ours alone everything counts; beside others only what carries our marks.
        alone = bool(os.environ.get("OCID_REQUIRE_ALL") or os.environ.get("CI"))
        found = leftovers(before, [] if alone else [directory, f"{MARK}={os.environ[MARK]}"])
        unmount_below(directory)
        shutil.rmtree(directory)
    if failure:
        print(f"\nFAILED: {failure}")
    for line in found:
        print(f"left over: {line}")
    if failure or found:
        return 1
    print(f"\nAll of it happened, and nothing is left behind. {time.perf_counter() - demo.began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
