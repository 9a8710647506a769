"""libseccomp.so.2 through ctypes: one class that builds one filter and exports it as classic BPF.

Refuses policy: what is allowed is the caller's. The library is loaded at the first `Filter` or look-up, never by an
import, for most containers start from a cached program. See seccomp_init(3), seccomp_rule_add(3) and
seccomp_export_bpf(3).
"""

from __future__ import annotations

import errno
import os

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from types import TracebackType

SONAME = "libseccomp.so.2"
# seccomp.h
SCMP_ACT_KILL_PROCESS, SCMP_ACT_KILL_THREAD, SCMP_ACT_TRAP = 0x80000000, 0x00000000, 0x00030000
SCMP_ACT_ERRNO, SCMP_ACT_TRACE, SCMP_ACT_LOG, SCMP_ACT_ALLOW = 0x00050000, 0x7FF00000, 0x7FFC0000, 0x7FFF0000
SCMP_ACT_NOTIFY = 0x7FC00000
SCMP_CMP = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}
_NR_SCMP_ERROR = -1
_SCMP_FLTATR_CTL_OPTIMIZE = 8
_DIRECTORIES = ("/usr/local/lib", "/lib/{}", "/usr/lib/{}", "/lib64", "/usr/lib64", "/lib", "/usr/lib")


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))


class _ArgCmp(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


_loaded: list[ctypes.CDLL] = []


def _library() -> ctypes.CDLL:
    if not _loaded:
        try:
            lib = ctypes.CDLL(SONAME)
        except OSError as error:
            raise KernelError(errno.ENOENT, "dlopen", SONAME) from error
        lib.seccomp_init.restype = ctypes.c_void_p
        lib.seccomp_init.argtypes = [ctypes.c_uint32]
        lib.seccomp_release.restype = None
        lib.seccomp_release.argtypes = [ctypes.c_void_p]
        lib.seccomp_version.restype = ctypes.POINTER(_Version)
        lib.seccomp_arch_native.restype = ctypes.c_uint32
        lib.seccomp_arch_resolve_name.restype = ctypes.c_uint32
        lib.seccomp_arch_resolve_name.argtypes = [ctypes.c_char_p]
        lib.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        lib.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
        lib.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
        lib.seccomp_syscall_resolve_name_arch.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
        lib.seccomp_rule_add_array.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.POINTER(_ArgCmp),
        ]
        lib.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
        _loaded.append(lib)
    return _loaded[0]


def loaded() -> bool:
    """True once the library is in this process."""
    return bool(_loaded)


def identity() -> str:
    """What tells one installed libseccomp from another, without loading it: the file behind the soname, its size and
    mtime. "" when it is not where the usual directories are; the loader may still find it."""
    machine = os.uname().machine
    for pattern in _DIRECTORIES:
        path = f"{pattern.format(machine + '-linux-gnu')}/{SONAME}"
        try:
            info = os.stat(path)
        except OSError:
            continue
        return f"{path}:{info.st_dev}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}"
    return ""


def version() -> str:
    """The library's own version, "2.5.4"."""
    found = _library().seccomp_version().contents
    return f"{found.major}.{found.minor}.{found.micro}"


def arch_token(name: str) -> int:
    """seccomp_arch_resolve_name(3) for "x86_64", "x86", …: the audit architecture, 0 when the library has no such."""
    return int(_library().seccomp_arch_resolve_name(name.encode()))


def native_token() -> int:
    """seccomp_arch_native(3)."""
    return int(_library().seccomp_arch_native())


def syscall_number(name: str, token: int = 0) -> int | None:
    """The number of system call `name` for an architecture (native by default), negative where it is multiplexed or
    exists elsewhere only; None when the library does not know the name."""
    lib = _library()
    raw = name.encode()
    number = lib.seccomp_syscall_resolve_name_arch(token, raw) if token else lib.seccomp_syscall_resolve_name(raw)
    return None if number == _NR_SCMP_ERROR else int(number)


def _check(result: int, call: str, subject: object) -> None:
    # libseccomp returns -errno and leaves errno alone.
    if result < 0:
        raise KernelError(-result, call, subject)


class Filter:
    """seccomp_init(3): a filter under construction; released at the end of a `with`."""

    def __init__(self, default_action: int) -> None:
        self._lib = _library()
        self._context = self._lib.seccomp_init(default_action)
        if not self._context:
            raise KernelError(errno.EINVAL, "seccomp_init", hex(default_action))

    def __enter__(self) -> Filter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        context, self._context = self._context, None
        if context:
            self._lib.seccomp_release(context)

    def add_arch(self, token: int) -> None:
        """seccomp_arch_add(3); one that is there already is fine."""
        result = self._lib.seccomp_arch_add(self._context, token)
        if result != -errno.EEXIST:
            _check(result, "seccomp_arch_add", hex(token))

    def optimize(self) -> None:
        """A binary tree instead of a list (libseccomp 2.5.0); older ones go without."""
        self._lib.seccomp_attr_set(self._context, _SCMP_FLTATR_CTL_OPTIMIZE, 2)

    def add_rule(self, action: int, number: int, conditions: tuple[tuple[int, int, int, int], ...] = ()) -> None:
        """seccomp_rule_add_array(3); a condition is (argument, SCMP_CMP, datum, second datum) and all must hold.
        A rule that is there already is fine."""
        array = (_ArgCmp * max(len(conditions), 1))(*(_ArgCmp(*condition) for condition in conditions))
        result = self._lib.seccomp_rule_add_array(self._context, action, number, len(conditions), array)
        if result != -errno.EEXIST:
            _check(result, "seccomp_rule_add", f"system call {number}")

    def export(self) -> bytes:
        """seccomp_export_bpf(3): an array of struct sock_filter."""
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            _check(self._lib.seccomp_export_bpf(self._context, fd), "seccomp_export_bpf", f"fd {fd}")
            size = os.fstat(fd).st_size
            return os.pread(fd, size, 0)
        finally:
            os.close(fd)
