"""Volumes, mounts, secrets, and files carried in and out: -v, --mount, cp, commit, export, build."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conformance.clients.podman.tool import Podman
from conformance.clients.steps import expect, holds, same


def bind_mounts(it: Podman) -> None:
    data = it.folder("data")
    (data / "greeting").write_text("hello")
    same("-v", it.shell("cat /data/greeting", "-v", f"{data}:/data"), "hello")
    holds("ro", it.shell("touch /data/x", "-v", f"{data}:/data:ro", code=1), "Read-only file system")
    for label in ("z", "Z"):
        it.shell(f"touch /data/{label}", "-v", f"{data}:/data:{label}")
    same("what came back", sorted(os.listdir(data)), ["Z", "greeting", "z"])
    same("a single file", it.shell("cat /etc/motd", "-v", f"{data}/greeting:/etc/motd:ro"), "hello")
    options = it.shell(
        "awk '$5 == \"/data\" {print $6}' /proc/self/mountinfo", "-v", f"{data}:/data:nosuid,noexec,nodev"
    )
    holds("its options", options, "nosuid", "noexec", "nodev")
    holds(
        "noexec",
        it.shell("cp /bin/busybox /data/run; /data/run true", "-v", f"{data}:/data:noexec", code=126),
        "denied",
    )
    text = it.shell("echo changed > /data/greeting; cat /data/greeting", "-v", f"{data}:/data:O")
    same("an overlay of it", (text, (data / "greeting").read_text()), ("changed", "hello"))


def propagation(it: Podman) -> None:
    """Of a mount on the host that others see, as /run/netns is one."""
    shared = it.folder("shared")
    subprocess.run(["mount", "--bind", shared, shared], check=True)
    subprocess.run(["mount", "--make-shared", shared], check=True)
    try:
        for option, field in (("rshared", "shared:"), ("rslave", "master:")):
            it.start(option, "-v", f"{shared}:/shared:{option}")
            holds(option, it("exec", option, "grep", " /shared ", "/proc/self/mountinfo"), field)
            with mounted(shared / "new"):
                same(f"a later mount under {option}", it("exec", option, "stat", "-fc", "%T", "/shared/new"), "tmpfs")
        it.start("private", "-v", f"{shared}:/shared")
        with mounted(shared / "new"):
            same("a later mount as it comes", it("exec", "private", "stat", "-fc", "%T", "/shared/new"), "ext2/ext3")
    finally:
        it.tidy()
        subprocess.run(["umount", shared], check=True)


@contextmanager
def mounted(path: Path) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def mount_flag(it: Podman) -> None:
    data = it.folder("typed")
    same("type=bind", it.shell("touch /t/x && ls /t", "--mount", f"type=bind,src={data},dst=/t"), "x")
    text = it.shell("touch /t/y", "--mount", f"type=bind,src={data},dst=/t,ro", code=1)
    holds("type=bind,ro", text, "Read-only file system")
    text = it.shell("df -k /t | awk 'END {print $2}'", "--mount", "type=tmpfs,dst=/t,tmpfs-size=2m")
    same("type=tmpfs", text, "2048")
    same("a tmpfs over a directory keeps its files", it.shell("cat /www/index.html | wc -l", "--tmpfs", "/www"), "1")
    text = it.shell("ls -d /host/bin/busybox", "--mount", "type=image,src=" + it.image + ",dst=/host")
    same("type=image", text, "/host/bin/busybox")


def named_volumes(it: Podman) -> None:
    it("volume", "create", "kept")
    try:
        it.shell("echo one > /kept/file", "-v", "kept:/kept")
        same("the next container", it.shell("cat /kept/file", "-v", "kept:/kept:ro"), "one")
        it.shell("test -s /www/index.html", "-v", "kept2:/www")  # an empty volume is filled from the image
    finally:
        it("volume", "rm", "--all", "--force")


def secrets(it: Podman) -> None:
    it("secret", "create", "word", it.file("word.txt", "swordfish"))
    try:
        same(
            "as a file",
            it.shell("cat /run/secrets/word; stat -c ' %a' /run/secrets/word", "--secret", "word"),
            "swordfish 444",
        )
        same("as a variable", it.shell("echo $WORD", "--secret", "word,type=env,target=WORD"), "swordfish")
    finally:
        it("secret", "rm", "word")


def copies(it: Podman) -> None:
    it.start("box")
    source = it.file("carried", "carried in", 0o640)
    it("cp", source, "box:/tmp/")
    same("inside", it("exec", "box", "sh", "-c", "cat /tmp/carried; stat -c ' %a' /tmp/carried"), "carried in 640")
    it("exec", "box", "sh", "-c", "mkdir /tmp/tree; echo out > /tmp/tree/file; ln -s file /tmp/tree/link")
    it("cp", "box:/tmp/tree", it.directory / "tree")
    same("outside", (it.directory / "tree" / "file").read_text(), "out\n")
    same("a link", os.readlink(it.directory / "tree" / "link"), "file")
    it("pause", "box")
    it("cp", source, "box:/tmp/while-paused")
    it("unpause", "box")
    same("put there while paused", it("exec", "box", "cat", "/tmp/while-paused"), "carried in")
    it("stop", "-t", "0", "box")
    it("cp", "box:/tmp/carried", it.directory / "after-stop")
    same("taken out when stopped", (it.directory / "after-stop").read_text(), "carried in")


def commit(it: Podman) -> None:
    it.start("origin")
    it("exec", "origin", "touch", "/committed")
    it("commit", "--quiet", "--pause", "origin", "derived")
    try:
        same("state after a pausing commit", it.state("origin"), "running")
        it("run", "--rm", "--net", "none", "derived", "test", "-e", "/committed")
        holds("diff", it("diff", "origin"), "A /committed")
    finally:
        it("rm", "-f", "-t", "0", "origin")
        it("rmi", "derived")


def build(it: Podman) -> None:
    """RUN goes through the runtime: buildah, as podman has it inside."""
    context = it.folder("context")
    (context / "page").write_text("built\n")
    (context / "Containerfile").write_text(
        f"FROM {it.image}\nENV STAGE=build\nWORKDIR /work\nCOPY page .\n"
        "RUN id -u > user && echo $STAGE >> user && test ! -e /run/none\n"
        'USER operator\nRUN test "$(id -un)" = operator\nCMD ["cat", "/work/user", "/work/page"]\n'
    )
    it("build", "--quiet", "--pull=never", "--network", "none", "--tag", "built", context)
    try:
        same("the image's command", it("run", "--rm", "--net", "none", "built").split(), ["0", "build", "built"])
        (context / "Containerfile").write_text(f"FROM {it.image}\nRUN exit 3\n")
        holds("a RUN that fails", it("build", "--pull=never", "--network", "none", context, code=3), "exit status 3")
    finally:
        it("rm", "--all", "--force")
        it("rmi", "built")


def rootfs(it: Podman) -> None:
    """A plain directory as the root, without an image."""
    root = it.folder("plain")
    it("create", "--name", "source", it.image)
    it("export", "--output", it.directory / "root.tar", "source")
    it(
        "run",
        "--rm",
        "--net",
        "none",
        "-v",
        f"{it.directory}:/at",
        it.image,
        "tar",
        "-xf",
        "/at/root.tar",
        "-C",
        "/at/plain",
    )
    same(
        "--rootfs", it("run", "--rm", "--net", "none", "--rootfs", root, "sh", "-c", "echo plain; touch /made"), "plain"
    )
    expect((root / "made").exists(), "what it made is not in the directory")


STEPS = (
    bind_mounts,
    propagation,
    mount_flag,
    named_volumes,
    secrets,
    copies,
    commit,
    build,
    rootfs,
)
