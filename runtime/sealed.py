"""The interpreter that enters containers runs from a copy that nobody can write (CVE-2019-5736).

/proc/self/exe of a process inside a container leads back to the file it was started from, past every mount namespace.
Three ways, the first that works:

- An interpreter that was started through the dynamic loader, or that goes on from a dump, as the command `ocirun` does,
  changes in place what its /proc/self/exe leads to: an empty memfd with seals (runtime/linux/exe.py). A fraction of a
  millisecond.
- It starts once more, from an overlay without an upper layer, mounted nowhere: it cannot be opened for writing,
  remounted or found by name, and its pages are those of the real interpreter, so it costs no memory.
- Where no overlay can be made (an ordinary user), it starts once more from a memfd with seals: one of what it was
  started through, launcher or loader, which are a thousandth and a thirtieth of the interpreter.

Refuses to go on unsealed. Invariant: argv[0] is the real interpreter's path, from which Python finds its standard
library; nothing of the environment or of site-packages is taken in (-I -S).
"""

from __future__ import annotations

import os
import sys

from runtime.linux import dumped
from runtime.linux.files import OVERLAYFS_SUPER_MAGIC, fstatfs_type, sealed_memfd
from runtime.linux.libc import KernelError
from runtime.linux.process import execveat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_AT_EMPTY_PATH = 0x1000
_MAX_INTERPRETER = 256 << 20
_ST_SEALED = 1 | 2 | 4  # ST_RDONLY, ST_NOSUID, ST_NODEV: the attributes that `interpreter_fd` asks for
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PATH = f"sys.path.append({_ROOT!r})"
_MEMFD_NAME = "ocid-interpreter"
_EMPTY_NAME = "ocid-no-interpreter"


def interpreter() -> str:
    """The real path of the interpreter that runs this, whatever link it was started through."""
    path = sys.executable
    while os.path.islink(path):
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return os.path.normpath(path)


def interpreter_fd() -> int:
    """A sealed copy of the interpreter, CLOEXEC; the caller owns it. Raises OSError."""
    path = interpreter()
    try:
        return _overlay_fd(path)
    except KernelError:  # no overlayfs, no right to mount, or a filesystem that overlayfs does not take
        with open(path, "rb") as file:
            return sealed_memfd(_MEMFD_NAME, file.read(_MAX_INTERPRETER))


def _overlay_fd(path: str) -> int:
    # Imported here: an interpreter that seals itself in place needs none of it.
    from runtime.linux.mount import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY, FsMount

    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    # overlayfs wants two lower layers where there is no upper one; the second only lies below.
    layers = (os.path.dirname(path), os.path.dirname(os.path.abspath(__file__)))
    try:
        mounted = FsMount("overlay", "overlay", tuple(("lowerdir+", layer) for layer in layers), attributes).make()
    except KernelError:
        # Linux before 6.5. A colon or backslash in a path, or a long one, is not worth the words: a memfd takes over.
        joined = ":".join(layers)
        if joined.count(":") > 1 or "\\" in joined or len(os.fsencode(joined)) > 255:
            raise
        mounted = FsMount("overlay", "overlay", (("lowerdir", joined),), attributes).make()
    try:
        return os.open(os.path.basename(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=mounted)
    finally:
        os.close(mounted)


def secure(module: str, arguments: Sequence[str]) -> None:
    """Returns in an interpreter that is sealed: this one, where that is so or can be done in place; else in a fresh
    one, which starts as `module`.main(arguments). Raises OSError."""
    if not is_sealed() and not _seal_in_place():
        enter(module, arguments)


def _seal_in_place() -> bool:
    from runtime.linux.exe import set_exe_file

    try:
        fd = sealed_memfd(_EMPTY_NAME, b"")
        try:
            set_exe_file(fd)
        finally:
            os.close(fd)
    except KernelError:  # no loader, no right, or no such call in this kernel
        return False
    return True


def is_sealed() -> bool:
    """True when this very process runs from a sealed copy."""
    try:
        fd = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.readlink("/proc/self/exe").startswith((f"/memfd:{_MEMFD_NAME}", f"/memfd:{_EMPTY_NAME}")):
            return True
        # Not just any read-only overlay: the root of a container of others is one, and can be remounted.
        return fstatfs_type(fd) == OVERLAYFS_SUPER_MAGIC and os.fstatvfs(fd).f_flag & _ST_SEALED == _ST_SEALED
    finally:
        os.close(fd)


def command(module: str, arguments: Sequence[str]) -> list[str]:
    """The argv that runs `module`.main(argv) in an isolated interpreter; exec it on `interpreter_fd()`."""
    boot = f"import sys; {_PATH}; from {module} import main; sys.exit(main(sys.argv[1:]))"
    return [interpreter(), "-IS", "-c", boot, *arguments]


def enter(module: str, arguments: Sequence[str]) -> NoReturn:
    """Goes on as `module`.main(arguments) in a sealed interpreter, in this very process. Raises OSError."""
    env = [key + b"=" + value for key, value in os.environb.items()]
    if dumped.is_resumed and module == "runtime.cli":
        with open("/proc/self/exe", "rb") as file:  # the launcher
            fd = sealed_memfd(_MEMFD_NAME, file.read(_MAX_INTERPRETER))
        execveat(fd, "", [os.fsencode(word) for word in (sys.argv[0], *arguments)], env, _AT_EMPTY_PATH)
    fd, words = _loader() or (interpreter_fd(), [interpreter()])
    # One command is over in milliseconds: collecting garbage, and taking the interpreter apart at the end, would be a
    # tenth of them. Whatever a command writes it writes unbuffered.
    boot = f"import gc, os, sys; gc.disable(); {_PATH}; from {module} import main; os._exit(main(sys.argv[1:]))"
    program = getattr(sys.modules["__main__"], "__file__", "")
    # The command starts as it was started, with its modules in one file (runtime/boot.py).
    start = [program] if module == "runtime.cli" and os.path.basename(program) == "boot.pyc" else ["-c", boot]
    argv = [os.fsencode(word) for word in (*words, "-IS", *start, *arguments)]
    execveat(fd, "", argv, env, _AT_EMPTY_PATH)
    raise AssertionError("execveat returned")


def _loader() -> tuple[int, list[str]] | None:
    """A sealed copy of the dynamic loader that this process was started through, and the words that start it again."""
    from runtime.linux.exe import is_loader

    path = os.readlink("/proc/self/exe")
    if not is_loader(path):
        return None
    with open(path, "rb") as file:
        return sealed_memfd(_MEMFD_NAME, file.read(_MAX_INTERPRETER)), [path, interpreter()]
