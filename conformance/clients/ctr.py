"""Debian's containerd, driven by its own `ctr`: tasks, execs, pauses, metrics, confinement.

Each call of ctr goes through containerd's shim (io.containerd.runc.v2) to the runtime given as --runc-binary.
Invariant: `tidy` leaves no task and no container.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conformance import daemons
from conformance.clients.steps import Surprise, criu_fails, eventually, expect, holds, same
from conformance.clients.terminal import INTERRUPT, Terminal
from conformance.registry import Registry

CALL_S = 60
# Ends with 4 on SIGTERM; says when it can.
POLITE = "trap 'exit 4' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.1; done"


@dataclass(slots=True)
class Ctr:
    """`binary` is the runtime, `image` in containerd's store already."""

    runtime: str
    binary: str
    socket: Path
    directory: Path
    image: str

    def words(self, *words: object) -> list[str]:
        return ["ctr", "--address", str(self.socket), "--namespace", "clients", *map(str, words)]

    def __call__(self, *words: object, code: int = 0) -> str:
        """Its standard output; of a call that is expected to fail, both streams."""
        result = subprocess.run(
            self.words(*words),
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
        )
        if result.returncode != code:
            said = f"{result.stderr.strip()} {result.stdout.strip()}".strip()
            raise Surprise(
                f"ctr {' '.join(map(str, words))}: expected exit code {code}, got {result.returncode}: {said}"
            )
        return result.stdout.strip() if code == 0 else f"{result.stdout.strip()}\n{result.stderr.strip()}"

    def run(self, script: str, *options: object, code: int = 0) -> str:
        """What a shell prints in a container of its own."""
        return self("run", *self.options, "--rm", *options, self.image, "once", "sh", "-c", script, code=code)

    def start(self, name: str, *options: object, script: str = "exec sleep 3600") -> None:
        self("run", *self.options, "--detach", *options, self.image, name, "sh", "-c", script)

    @property
    def options(self) -> tuple[str, ...]:
        return ("--runc-binary", self.binary)

    def exec(self, name: str, *words: object, code: int = 0) -> str:
        return self("task", "exec", "--exec-id", f"e{os.urandom(4).hex()}", name, *words, code=code)

    def state(self, name: str) -> str:
        found = re.search(rf"^{name}\s+\d+\s+(\S+)", self("task", "ls"), re.MULTILINE)
        return found[1] if found else "none"

    def pid(self, name: str) -> int:
        found = re.search(rf"^{name}\s+(\d+)", self("task", "ls"), re.MULTILINE)
        return int(found[1]) if found else 0

    def tidy(self) -> None:
        for name in self("task", "ls", "-q").split():
            self("task", "rm", "--force", name)
        names = self("container", "ls", "-q").split()
        if names:
            self("container", "rm", *names)


def run(it: Ctr) -> None:
    same("stdout", it.run("echo hello"), "hello")
    it.run("exit 7", code=7)
    it.run("sh -c 'kill -TERM $$'; exit $?", code=143)


def what_is_not_there(it: Ctr) -> None:
    said = it("run", *it.options, "--rm", it.image, "none", "no-such-command", code=1)
    holds("the error", said, "OCI runtime create failed", "executable file not found in $PATH")
    same("containers afterwards", it("container", "ls", "-q"), "")


def task_kill(it: Ctr) -> None:
    it.start("polite", script=POLITE)
    pid = it.pid("polite")
    expect(b"trap" in Path(f"/proc/{pid}/cmdline").read_bytes(), f"pid {pid} is not the container's")
    eventually(lambda: Path(f"/proc/{pid}/root").exists(), "it runs")
    eventually(lambda: _catches(pid, 15), "its trap is set")
    it("task", "kill", "polite")
    eventually(lambda: it.state("polite") == "STOPPED", "SIGTERM ends it")
    holds("task rm", _both(it, "task", "rm", "polite"), "exit code 4")
    it.start("stubborn")
    it("task", "kill", "--signal", "SIGKILL", "stubborn")
    eventually(lambda: it.state("stubborn") == "STOPPED", "SIGKILL ends it")
    holds("task rm", _both(it, "task", "rm", "stubborn"), "exit code 137")


def _catches(pid: int, number: int) -> bool:
    """True once a handler for this signal is installed."""
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(found and int(found[1], 16) & 1 << (number - 1))


def _both(it: Ctr, *words: object) -> str:
    """Both streams; ctr hands a task's exit code on as a warning and, for `task rm`, also as its own."""
    result = subprocess.run(it.words(*words), capture_output=True, text=True, timeout=CALL_S, check=False)
    return result.stdout + result.stderr


def task_exec(it: Ctr) -> None:
    it.start("box")
    same("stdout", it.exec("box", "id", "-u"), "0")
    it.exec("box", "sh", "-c", "exit 3", code=3)
    holds(
        "a missing command", it.exec("box", "no-such", code=1), "OCI runtime exec failed", "executable file not found"
    )
    text = it("task", "exec", "--exec-id", "as", "--cwd", "/tmp", "--user", "1000", "box", "sh", "-c", "pwd; id -u")
    same("--cwd, --user", text.split(), ["/tmp", "1000"])
    it("task", "exec", "--exec-id", "later", "--detach", "box", "sleep", "1234")
    eventually(lambda: "later" in it("task", "ps", "box"), "the detached exec is listed")
    it("task", "kill", "--exec-id", "later", "--signal", "SIGKILL", "box")
    eventually(lambda: "1234" not in it.exec("box", "ps", "-o", "args"), "SIGKILL ends the exec")
    same("the container afterwards", it.state("box"), "RUNNING")


def terminal(it: Ctr) -> None:
    it.start("box")
    for words in (
        ("run", *it.options, "--rm", "--tty", it.image, "tty", "sh"),
        ("task", "exec", "--exec-id", "tty", "--tty", "box", "sh"),
    ):
        with Terminal(it.words(*words), it.directory, dict(os.environ), lines=33, columns=99) as screen:
            screen.type("until [ \"$(stty size)\" = '33 99' ]; do :; done; tty; echo si'zed'\n")
            holds("the terminal inside", screen.until("sized"), "/dev/pts/")
            screen.type("trap 'echo inter\\rupted; exit 5' INT; echo wai'ting'; while :; do sleep 0.1; done\n")
            screen.until("waiting")
            screen.type(INTERRUPT)
            screen.until("interrupted")
            same("exit code", screen.end(), 5)


def pause(it: Ctr) -> None:
    it.start("clock", script="i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; done")
    count = Path(f"/proc/{it.pid('clock')}/root/dev/shm/count")
    eventually(count.exists, "the clock ticks")
    it("task", "pause", "clock")
    same("state", it.state("clock"), "PAUSED")
    seen = [count.read_text() for _ in range(20)]
    same("what a paused task counts", len(set(seen)), 1)
    it("task", "resume", "clock")
    same("state", it.state("clock"), "RUNNING")
    eventually(lambda: count.read_text() != seen[0], "it counts on")


def metrics(it: Ctr) -> None:
    it.start("busy", "--memory-limit", str(64 << 20), script="sleep 3600 & while :; do :; done")
    eventually(lambda: len(it("task", "ps", "busy").splitlines()) == 3, "both processes are listed")
    seen = json.loads(it("task", "metrics", "--format", "json", "busy"))
    same("pids", seen["pids"]["current"], 2)
    same("the memory limit", seen["memory"]["usage"].get("limit"), 64 << 20)
    expect(0 < seen["memory"]["usage"]["usage"] < 64 << 20, f"memory in use: {seen['memory']['usage']}")
    before = seen["cpu"]["usage"]["total"]
    eventually(lambda: _cpu(it, "busy") > before, "CPU time grows")


def _cpu(it: Ctr, name: str) -> int:
    return int(json.loads(it("task", "metrics", "--format", "json", name))["cpu"]["usage"]["total"])


def memory(it: Ctr) -> None:
    it.run("tail /dev/zero", "--memory-limit", str(20 << 20), code=137)


def confinement(it: Ctr) -> None:
    holds("--read-only", it.run("touch /x", "--read-only", code=1), "Read-only file system")
    holds("--cap-drop", it.run("chown 1 /tmp", "--cap-drop", "CAP_CHOWN", code=1), "not permitted")
    ours = re.findall(r"CapBnd:\s*(\S+)", Path("/proc/self/status").read_text())
    same("--privileged", it.run("awk '/CapEff/ {print $2}' /proc/self/status", "--privileged").split(), ours)
    same("--seccomp", it.run("awk '/^Seccomp:/ {print $2}' /proc/self/status", "--seccomp"), "2")
    same("NoNewPrivs", it.run("awk '/NoNewPrivs/ {print $2}' /proc/self/status"), "1")
    same("--allow-new-privs", it.run("awk '/NoNewPrivs/ {print $2}' /proc/self/status", "--allow-new-privs"), "0")
    same("--device", it.run("stat -c '%t %T' /dev/fuse; : < /dev/fuse", "--device", "/dev/fuse"), "a e5")
    same("--cpus", it.run("cat /proc/self/cgroup > /dev/null; echo fine", "--cpus", "0.5"), "fine")


def mounts_and_namespaces(it: Ctr) -> None:
    (it.directory / "shared").mkdir(exist_ok=True)
    option = f"type=bind,src={it.directory}/shared,dst=/shared,options=rbind:rw"
    it.run("echo out > /shared/file", "--mount", option)
    same("what came back", (it.directory / "shared" / "file").read_text(), "out\n")
    holds("ro", it.run("touch /shared/x", "--mount", option.replace(":rw", ":ro"), code=1), "Read-only file system")
    same("--env, --cwd", it.run("echo $A; pwd", "--env", "A=b", "--cwd", "/tmp").split(), ["b", "/tmp"])
    text = it.run("readlink /proc/self/ns/net", "--with-ns", f"network:/proc/{os.getpid()}/ns/net")
    same("--with-ns", text, os.readlink("/proc/self/ns/net"))
    text = it.run("cat /proc/self/cgroup", "--cgroup", f"/libpod-none-{os.getpid()}/deep")
    holds("--cgroup", text, f"/libpod-none-{os.getpid()}/deep")
    daemons.remove_cgroup(f"libpod-none-{os.getpid()}")


def rootfs(it: Ctr) -> None:
    """A directory as the root, without an image; and what the runtime's own state says meanwhile."""
    root = it.directory / "plain"
    (root / "bin").mkdir(parents=True, exist_ok=True)
    (root / "bin" / "busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin" / "busybox").chmod(0o755)
    words = ("run", *it.options, "--rm", "--rootfs", root, "plain", "/bin/busybox", "echo", "plain")
    same("--rootfs", it(*words), "plain")


def checkpoint(it: Ctr) -> str | None:
    """Into an image, and out of it as another container."""
    script = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/n; sleep 0.1; done"
    it.start("counts", script=script)
    eventually(lambda: it.exec("counts", "ls", "/dev/shm") == "n", "it counts")
    before = int(it.exec("counts", "cat", "/dev/shm/n"))
    words = ("container", "checkpoint", "--rw", "--task", "--image", "counts", "localhost/checkpoint:1")
    if missing := criu_fails():
        it(*words, code=1)
        same("state after a checkpoint that failed", it.state("counts"), "RUNNING")
        eventually(lambda: int(it.exec("counts", "cat", "/dev/shm/n")) > before, "it counts on")
        return f"criu does not work here ({missing}); the task outlives a checkpoint that fails"
    it(*words)
    it("task", "rm", "--force", "counts")  # both would have the same cgroup
    try:
        it("container", "restore", "--rw", "--live", "elsewhere", "localhost/checkpoint:1")
        expect(int(it.exec("elsewhere", "cat", "/dev/shm/n")) >= before, "out of the image it begins anew")
    finally:
        it("image", "rm", "localhost/checkpoint:1")
    return None


STEPS = (
    run,
    what_is_not_there,
    task_kill,
    task_exec,
    terminal,
    pause,
    metrics,
    memory,
    confinement,
    mounts_and_namespaces,
    rootfs,
    checkpoint,
)


@contextmanager
def ctr(runtime: str, directory: Path, images: Registry, image: str) -> Iterator[Ctr]:
    """A containerd of its own, with `image` pulled."""
    binary = daemons.command_path("ocirun") if runtime == "ocirun" else runtime
    try:
        with daemons.containerd(directory, images.address, runtime=binary) as daemon:
            it = Ctr(runtime, binary, daemon.socket, directory, images.reference(image))
            it("image", "pull", "--plain-http", it.image)
            yield it
    finally:
        daemons.remove_cgroup("clients")
