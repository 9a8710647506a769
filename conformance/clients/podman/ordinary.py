"""podman as an ordinary user has it: no root, ids from /etc/subuid, a user namespace around everything.

The user exists in this mount namespace only (`known`). Steps are those where being nobody special makes a difference.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conformance.clients.podman.tool import Podman, configure
from conformance.clients.steps import eventually, expect, holds, same
from conformance.clients.terminal import INTERRUPT

UID, NAME = 4321, "ordinary"
# The first of his subordinate ids, and how many.
SUBIDS = (2_000_000, 65_536)
RUNTIME_DIRECTORY = Path(f"/run/user/{UID}")


class Ordinary(Podman):
    """Every podman is his process."""

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "XDG_RUNTIME_DIR": str(RUNTIME_DIRECTORY), "USER": NAME}

    def words(self, *words: object) -> list[str]:
        become = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups"]
        return [*become, *super().words(*words)]

    @property
    def driver(self) -> str:
        return "vfs"  # overlay would need fuse-overlayfs, or a kernel that lets users mount it


def run(it: Podman) -> None:
    lines = it.shell("id -u; cat /proc/self/uid_map; touch /made && echo made").split()
    same("uid, map, a file", lines, ["0", "0", str(UID), "1", "1", str(SUBIDS[0]), str(SUBIDS[1]), "made"])
    it.shell("exit 7", code=7)
    holds("a missing command", it.run("IMAGE", "no-such", code=127), "executable file not found in $PATH")
    it.start("box")
    same("whose process it is outside", Path(f"/proc/{it.pid('box')}").stat().st_uid, UID)


def users(it: Podman) -> None:
    it.start("box", "--user", "1000")
    same("its uid outside", Path(f"/proc/{it.pid('box')}").stat().st_uid, SUBIDS[0] + 999)
    same("exec as root", it("exec", "-u", "0", "box", "id", "-u"), "0")
    same("exec as it is", it("exec", "box", "id", "-u"), "1000")
    same("--userns keep-id", it.shell("id -u", "--userns", "keep-id"), str(UID))
    holds("--user by name", it.shell("id -un; id -G", "--user", "operator"), "operator")


def life(it: Podman) -> None:
    it.start("polite", "IMAGE", "sh", "-c", "trap 'exit 4' TERM; echo ready; while :; do sleep 0.1; done")
    eventually(lambda: "ready" in it("logs", "polite"), "its trap is set")
    holds("top", it("top", "polite", "user", "args"), "root", "trap")
    it("stop", "--time", "10", "polite")
    same("exit code", it.inspect("polite")["State"]["ExitCode"], 4)
    it("start", "polite")
    it("kill", "polite")
    same("wait", it("wait", "polite"), "137")


def terminals(it: Podman) -> None:
    with it.terminal("run", "--rm", "-it", "--net", "none", "IMAGE", "sh", lines=33, columns=99) as terminal:
        terminal.type("until [ \"$(stty size)\" = '33 99' ]; do :; done; tty; echo si'zed'\n")
        holds("the terminal inside", terminal.until("sized"), "/dev/pts/0")
        terminal.type("trap 'echo inter\\rupted; exit 5' INT; echo wai'ting'; while :; do sleep 0.1; done\n")
        terminal.until("waiting")
        terminal.type(INTERRUPT)
        terminal.until("interrupted")
        same("exit code", terminal.end(), 5)


def confinement(it: Podman) -> None:
    same("--cap-drop all", it.shell("awk '/CapEff/ {print $2}' /proc/self/status", "--cap-drop", "all"), "0" * 16)
    same("seccomp", it.shell("awk '/^Seccomp:/ {print $2}' /proc/self/status"), "2")
    holds("--read-only", it.shell("touch /tmp/x && touch /x", "--read-only", code=1), "Read-only file system")
    holds("a device of the host", it.shell("mknod /tmp/x b 7 0", code=1), "not permitted")
    holds("--privileged", it.shell("mount -t tmpfs none /tmp && echo mounted", "--privileged"), "mounted")


def volumes(it: Podman) -> None:
    data = it.folder("data")
    os.chown(data, UID, UID)
    it.shell("touch /data/root; touch /data/other && chown 5 /data/other", "-v", f"{data}:/data")
    same(
        "whose files they are outside",
        [(data / name).stat().st_uid for name in ("root", "other")],
        [UID, SUBIDS[0] + 4],
    )
    holds("ro", it.shell("touch /data/x", "-v", f"{data}:/data:ro", code=1), "Read-only file system")
    same("--tmpfs", it.shell("df -k /t | awk 'END {print $2}'", "--tmpfs", "/t:size=1m"), "1024")


def pod(it: Podman) -> None:
    it("pod", "create", "--name", "team", "--network", "none", "--share", "net,ipc,uts")
    it("run", "-d", "--pod", "team", "--name", "server", it.image, "httpd", "-f", "-h", "/www")
    text = it("run", "--rm", "--pod", "team", it.image, "sh", "-c", "wget -q -O- http://127.0.0.1/; hostname")
    holds("from beside it", text, "Hello", "team")


def build(it: Podman) -> None:
    context = it.folder("context")
    (context / "Containerfile").write_text(
        f"FROM {it.image}\nRUN id -u > /user && chown 5 /user\nCMD stat -c %u /user\n"
    )
    it("build", "--quiet", "--pull=never", "--network", "none", "--tag", "built", context)
    try:
        same("the image's command", it("run", "--rm", "--net", "none", "built"), "5")
    finally:
        it("rmi", "built")


def host_network(it: Podman) -> None:
    pid = it("run", "-d", "--net", "host", "--name", "host", it.image, "sleep", "3600") and it.pid("host")
    same("the network namespace", os.readlink(f"/proc/{pid}/ns/net"), os.readlink("/proc/self/ns/net"))
    expect(os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user"), "it is in our user namespace")


STEPS = (run, users, life, terminals, confinement, volumes, pod, build, host_network)


@contextmanager
def known(base: Path) -> Iterator[None]:
    """Puts the user into what this mount namespace has at /etc."""
    with ExitStack() as stack:
        for name, line in (("passwd", f"{NAME}:x:{UID}:{UID}::/:/bin/sh"), ("group", f"{NAME}:x:{UID}:")):
            file = base / name
            file.write_text(Path("/etc", name).read_text() + line + "\n")
            subprocess.run(["mount", "--bind", file, f"/etc/{name}"], check=True)
            stack.callback(subprocess.run, ["umount", f"/etc/{name}"], check=True)
        RUNTIME_DIRECTORY.mkdir(parents=True)
        os.chown(RUNTIME_DIRECTORY, UID, UID)
        yield


@contextmanager
def ordinary(runtime: str, directory: Path, image: str) -> Iterator[Ordinary]:
    """podman of that user below `directory`, which becomes his, with `image` in his store."""
    configure(directory)
    for above in (directory.parent, directory):
        above.chmod(0o755)
    for mine in (directory, directory / "net.d"):
        os.chown(mine, UID, UID)
    with known(directory.parent):
        it = Ordinary(runtime, directory, image)
        try:
            it("pull", "--quiet", "--tls-verify=false", image)
            yield it
        finally:
            it.tidy()
            it("rmi", "--all", "--force")
            it("system", "migrate")  # ends the process that holds his user namespace
            for path in sorted(RUNTIME_DIRECTORY.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            RUNTIME_DIRECTORY.rmdir()
