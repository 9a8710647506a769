"""The kernel leaf and the sealed interpreter, where only a real kernel can say whether they do what they promise."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import install, sealed
from runtime.linux import mount as leaf
from runtime.linux.files import OVERLAYFS_SUPER_MAGIC, fstatfs_type, mkdir_in_root, remove_tree
from runtime.linux.libc import KernelError
from runtime.linux.mount import MNT_DETACH, mount, umount2
from tests.support import needs

LOW = """
import os, resource, sys
sys.path.insert(0, sys.argv[2])
from runtime.linux.files import remove_tree
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
remove_tree(sys.argv[1])
"""


def deep(top: Path, levels: int) -> None:
    """`levels` directories in each other, each with a file and a link; made by fds, since the path is too long."""
    top.mkdir()
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.symlink("/etc", "link", dir_fd=here)
        os.mkdir("a-directory-of-some-length", dir_fd=here)
        below = os.open("a-directory-of-some-length", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_remove_tree_of_any_depth_needs_few_fds(tmp_path: Path) -> None:
    deep(tmp_path / "deep", 700)
    repository = str(Path(sealed.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOW, str(tmp_path / "deep"), repository], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert os.listdir(tmp_path) == [] and Path("/etc/passwd").exists()


def test_remove_tree_follows_no_link_and_crosses_no_mount(tmp_path: Path) -> None:
    needs("root")
    outside = tmp_path / "outside"
    (outside / "below").mkdir(parents=True)
    (outside / "below/file").write_text("stays")
    tree = tmp_path / "tree"
    (tree / "mounted").mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    before = len(os.listdir("/proc/self/fd"))
    mount(str(outside), str(tree / "mounted"), None, leaf.MS_BIND)
    try:
        with pytest.raises(OSError) as caught:
            remove_tree(tree)
        assert caught.value.errno in (errno.EXDEV, errno.EBUSY)
    finally:
        umount2(str(tree / "mounted"), MNT_DETACH)
    assert (outside / "below/file").read_text() == "stays"
    remove_tree(tree)
    remove_tree(tree)
    assert not tree.exists() and (outside / "below/file").exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_o37_two_that_remove_one_tree_both_succeed(tmp_path: Path) -> None:
    """As two `delete --force` of one container do; either may find anything gone at any moment."""
    for turn in range(6):
        tree = tmp_path / f"tree{turn}"
        for number in range(40):
            (tree / f"d{number}/below").mkdir(parents=True)
            (tree / f"d{number}/below/file").touch()
        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    remove_tree(tree)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0, 0] and not tree.exists()


def test_directories_behind_dangling_links_are_made_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "var").mkdir(parents=True)
    (root / "var/run").symlink_to("../run")
    (root / "abs").symlink_to("/made/here")
    (root / "out").symlink_to("../../../../../../../../x/y")
    (root / "loop").symlink_to("loop")
    top = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        for path in ("var/run/a", "abs/b", "out/c"):
            os.close(mkdir_in_root(top, path))
        with pytest.raises(KernelError) as caught:
            mkdir_in_root(top, "loop/d")
        assert caught.value.errno == errno.ELOOP
    finally:
        os.close(top)
    assert (root / "run/a").is_dir() and (root / "made/here/b").is_dir() and (root / "x/y/c").is_dir()
    assert sorted(os.listdir(tmp_path)) == ["root"]


JOINED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from runtime.linux.mount import FsMount
from runtime.linux.process import CLONE_NEWNS, unshare
from runtime.linux.mount import mount
unshare(CLONE_NEWNS)
mount(None, "/", None, 1 << 18 | 16384)
base = sys.argv[2]
lower = ":".join(f"{base}/l{n}" for n in range(40))
upper = (("upperdir", f"{base}/active/u"), ("workdir", f"{base}/active/w"))
fd = FsMount("overlay", "overlay", (("lowerdir", lower), *upper)).make()
print(len(lower) > 255, sorted(os.listdir(f"/proc/self/fd/{fd}")) == sorted(f"f{n}" for n in range(40)))
"""


def test_o53_one_long_lowerdir_is_mounted_where_lowerdir_plus_is_unknown(tmp_path: Path) -> None:
    needs("root", "overlay")
    for number in range(40):
        (tmp_path / f"l{number}").mkdir()
        (tmp_path / f"l{number}" / f"f{number}").touch()
    for name in ("u", "w"):
        (tmp_path / "active" / name).mkdir(parents=True)
    words = [sys.executable, "-I", "-c", JOINED, str(Path(sealed.__file__).parent.parent), str(tmp_path)]
    assert subprocess.run(words, capture_output=True, check=True).stdout == b"True True\n"


def refuse(*names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsconfig(2) as a kernel has it that does not know these keys."""
    real = leaf.fsconfig

    def fsconfig(fd: int, command: int, key: str | None, value: str | None, aux: int = 0) -> None:
        if key in names:
            raise KernelError(errno.EINVAL, "fsconfig", key)
        real(fd, command, key, value, aux)

    monkeypatch.setattr(leaf, "fsconfig", fsconfig)


@pytest.mark.parametrize("missing", [(), ("lowerdir+",), ("lowerdir+", "lowerdir")])
def test_s01_the_sealed_interpreter_has_three_ways(missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    needs("root", "overlay")
    refuse(*missing, monkeypatch=monkeypatch)
    fd = sealed.interpreter_fd()
    try:
        assert (fstatfs_type(fd) == OVERLAYFS_SUPER_MAGIC) is (len(missing) < 2)
        with pytest.raises(OSError):  # an overlay without upper layer refuses to open it, a memfd's seals the write
            with open(
                f"/proc/self/fd/{fd}", "wb", buffering=0, opener=lambda path, _: os.open(path, os.O_WRONLY)
            ) as file:
                file.write(b"x")
        with pytest.raises(OSError):
            os.truncate(f"/proc/self/fd/{fd}", 0)
        words = sealed.command("runtime.sealed", [])
        words[3] = words[3].partition("from ")[0] + "from runtime import sealed; print(sealed.is_sealed())"
        done = subprocess.run(words, executable=f"/proc/self/fd/{fd}", pass_fds=(fd,), capture_output=True, check=False)
        assert done.stdout == b"True\n", done
    finally:
        os.close(fd)


IN_PLACE = """
import os, sys
sys.path.append(sys.argv[1])
from runtime import sealed
sealed.secure("nowhere", [])
fd = os.open("/proc/self/exe", os.O_RDONLY)
print(os.readlink("/proc/self/exe"), sealed.is_sealed(), os.fstat(fd).st_size, sys.executable)
# What the loader does from now on it does from the copy: libraries, thread-local storage, a child.
import ctypes, _sqlite3
ctypes.CDLL("libseccomp.so.2").seccomp_api_get()
if os.fork() == 0:
    ctypes.CDLL("libuuid.so.1")
    os._exit(3)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 3
print("ld-linux" in open("/proc/self/maps").read())
sys.stdout.flush()
script = "echo x 2>/dev/null >>/proc/self/fd/%d || echo refused; readlink /proc/$$/exe"
os.execv("/bin/sh", ["sh", "-c", script % os.dup(fd)])
"""


def test_s01_an_interpreter_behind_a_loader_is_sealed_in_place(tmp_path: Path) -> None:
    needs("root")
    program = tmp_path / "program.py"
    program.write_text(IN_PLACE)
    root = str(Path(sealed.__file__).parent.parent)
    words = [*install.loader(sealed.interpreter()), sealed.interpreter(), "-IS", str(program), root]
    done = subprocess.run(words, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done
    exe, mapped, *after = done.stdout.splitlines()
    assert exe == f"/memfd:ocid-no-interpreter (deleted) True 0 {sealed.interpreter()}"
    assert mapped == "False"  # the copies have no name
    assert after[0] == "refused" and after[1].endswith("sh")


def test_s01_without_a_loader_it_is_started_again_from_a_sealed_copy() -> None:
    needs("root", "overlay")
    root = str(Path(sealed.__file__).parent.parent)
    boot = f"import sys; sys.path.append({root!r}); from runtime import sealed; sealed.secure('runtime.cli', ['-v'])"
    assert not sealed.is_sealed()
    # Nothing but the other interpreter would say its version.
    done = subprocess.run([sealed.interpreter(), "-IS", "-c", boot], capture_output=True, check=False, text=True)
    assert done.returncode == 0 and done.stdout.startswith("ocirun version"), done
