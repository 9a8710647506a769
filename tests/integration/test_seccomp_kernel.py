"""Profiles in force: what the kernel answers to a process under the default profile and under made-up ones."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cri.spec import security
from runtime import seccomp, seccomp_load
from runtime.errors import RuntimeFailure
from runtime.fields import Fields
from runtime.linux.process import capset, set_no_new_privs
from tests.integration.cgroup_child import fork
from tests.support import needs

AF_ALG, AF_VSOCK = 38, 40
_libc = ctypes.CDLL(None, use_errno=True)
# push rbx; mov eax,edi; mov ebx,esi; mov ecx,edx; int 0x80; pop rbx; ret: a 32-bit call out of a 64-bit program
INT80 = bytes.fromhex("5389f889f389d1cd805bc3")


def call(number: int, *args: int) -> int:
    """The raw system call; 0 or more, or minus its errno."""
    result = int(_libc.syscall(ctypes.c_long(number), *(ctypes.c_long(arg) for arg in args)))
    return -ctypes.get_errno() if result == -1 else result


def call32(number: int, first: int = 0, second: int = 0) -> int:
    """The same by i386's table."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(INT80)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_uint)(address)
    return int(function(number, first, second))


def low_memory(data: bytes) -> int:
    """An address below 4 GiB, which a 32-bit pointer reaches."""
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = _libc.mmap(None, 4096, 3, 0x22 | 0x40, -1, 0)  # private, anonymous, MAP_32BIT
    ctypes.memmove(address, data, len(data))
    return int(address)


def under(profile: dict[str, object], tmp_path: Path, run: Callable[[], object]) -> str:
    """What `run` returns in a child on which the profile is in force, as text; or how the child ended."""
    parsed = seccomp.parse(Fields(profile, "linux.seccomp"))
    code = seccomp.program(parsed, str(tmp_path / "cache"))

    def confined() -> None:
        set_no_new_privs()
        seccomp_load.load(code, parsed.flags)
        os.write(1, repr(run()).encode())

    child = fork(confined)
    text = b"".join(iter(child.read, b"")).decode()
    ended = child.wait()
    return text if ended == 0 else f"ended {ended}"


def default(caps: tuple[str, ...] = security.DEFAULT_CAPABILITIES) -> dict[str, object]:
    return security.default_seccomp(caps)


def test_ordinary_programs_run(tmp_path: Path) -> None:
    script = (
        "set -e; ls / >/dev/null; echo a | sort | cat; (sleep 0.01 &); d=$(mktemp -d); rmdir $d; date >/dev/null; id -u"
    )

    def run() -> object:
        done = subprocess.run(["sh", "-c", script], capture_output=True, check=False)
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(1))
        thread.start()
        thread.join()
        sockets = [socket.socket(family) for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)]
        sockets.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
        return done.returncode, done.stdout, done.stderr, seen, len(sockets)

    assert under(default(), tmp_path, run) == repr((0, b"a\n0\n", b"", [1], 4))


def test_s22_no_namespaces_no_mounts(tmp_path: Path) -> None:
    def run() -> object:
        shell = subprocess.run(
            ["sh", "-c", "unshare -UrC sh -c 'mount -t cgroup -o memory x /mnt'"], capture_output=True, check=False
        )
        target = ctypes.create_string_buffer(str(tmp_path).encode())
        kind = ctypes.create_string_buffer(b"cgroup")
        address, what = ctypes.addressof(target), ctypes.addressof(kind)
        flags = 0x10000000 | 0x02000000 | signal.SIGCHLD
        return (
            shell.returncode != 0,
            call(165, what, address, what),
            call(272, 0x10000000),
            call(56, flags),
            call(435, 0, 0),
        )

    assert under(default(), tmp_path, run) == repr((True, *[-errno.EPERM] * 3, -errno.ENOSYS))


def test_s48_no_crypto_sockets_by_any_way_in(tmp_path: Path) -> None:
    def run() -> object:
        answers = []
        for family in (AF_ALG, AF_VSOCK):
            for high in (0, 1 << 32, 0xFFFFFFFF << 32):
                answers.append(call(41, family | high, socket.SOCK_SEQPACKET, 0))
            answers.append(call(41 | 0x40000000, family, socket.SOCK_SEQPACKET, 0))
        return set(answers)

    found = under(default(), tmp_path, run)
    assert found in (repr({-errno.EPERM}), repr({-errno.EPERM, -errno.ENOSYS})), found


def test_s48_nor_by_the_32_bit_table(tmp_path: Path) -> None:
    if fork(lambda: call32(20) != os.getpid()).wait() != 0:
        pytest.skip("this kernel runs no 32-bit calls")

    def run() -> object:
        alg = low_memory(struct.pack("=3I", AF_ALG, socket.SOCK_SEQPACKET, 0))
        inet = low_memory(struct.pack("=3I", socket.AF_INET, socket.SOCK_STREAM, 0))
        return call32(102, 1, alg), call32(102, 1, inet), call32(359, AF_ALG, 5), call32(359, 1, 1) > 0, call32(20) > 0

    assert under(default(), tmp_path, run) == repr((-1, -1, -1, True, True))
    bare = fork(lambda: call32(102, 1, low_memory(struct.pack("=3I", 2, 1, 0))) > 0 and 7)
    assert bare.wait() == 7  # which is how one knows that the refusal was the filter's


@pytest.mark.parametrize(
    ("name", "number", "answer"),
    [
        ("keyctl", 250, errno.EPERM),
        ("bpf", 321, errno.EPERM),
        ("userfaultfd", 323, errno.EPERM),
        ("io_uring_setup", 425, errno.EPERM),
        ("kexec_load", 246, errno.EPERM),
        ("open_by_handle_at", 304, errno.EPERM),
        ("of tomorrow", 600, errno.ENOSYS),
    ],
)
def test_refusals(tmp_path: Path, name: str, number: int, answer: int) -> None:
    assert under(default(), tmp_path, lambda: call(number, 0, 0, 0)) == repr(-answer), name


def test_capabilities_open_what_belongs_to_them(tmp_path: Path) -> None:
    admin = default((*security.DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN"))
    assert under(admin, tmp_path, lambda: call(272, 0x04000000)) == "0"  # unshare(CLONE_NEWUTS)
    assert under(default(), tmp_path, lambda: call(272, 0x04000000)) == repr(-errno.EPERM)


def test_the_strongest_actions(tmp_path: Path) -> None:
    for action, ended in (("SCMP_ACT_KILL_PROCESS", -signal.SIGSYS), ("SCMP_ACT_TRAP", -signal.SIGSYS)):
        rules = [{"names": ["getppid"], "action": action}]
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}
        assert under(profile, tmp_path, lambda: call(110)) == f"ended {ended}"


def test_errno_by_name(tmp_path: Path) -> None:
    rules = [{"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 77}]
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules, "flags": ["SECCOMP_FILTER_FLAG_LOG"]}
    assert under(profile, tmp_path, lambda: (call(110), call(39) > 0)) == repr((-77, True))


def test_exec_after_exec_stays_confined(tmp_path: Path) -> None:
    script = "import ctypes; l = ctypes.CDLL(None, use_errno=True); l.syscall(250, 0); print(ctypes.get_errno())"

    def run() -> object:
        return subprocess.run(["sh", "-c", f'python3 -c "{script}"'], capture_output=True, check=False).stdout

    assert under(default(), tmp_path, run) == repr(b"1\n")


def test_loading_without_right_says_what_to_do(tmp_path: Path) -> None:
    code = seccomp.program(seccomp.parse(Fields({"defaultAction": "SCMP_ACT_ALLOW"})), str(tmp_path / "cache"))

    def run() -> None:
        capset(0, 0, 0)
        try:
            seccomp_load.load(code, 0)
        except RuntimeFailure as failure:
            os.write(1, f"{failure}|{failure.hint}".encode())

    child = fork(run)
    said = child.read().decode()
    assert child.wait() == 0
    assert (
        said.startswith("load the seccomp filter: seccomp filter: EACCES permission denied|")
        and "CAP_SYS_ADMIN" in said
    )


def test_a_program_that_is_none_is_refused() -> None:
    def run() -> int:
        set_no_new_privs()
        for code in (b"", b"\0" * 8, b"\x20\0\0\0\0\0\0\0"):
            try:
                seccomp_load.load(code, 0)
            except RuntimeFailure as failure:
                assert failure.errno == errno.EINVAL
            else:
                return 1
        return 0

    assert fork(run).wait() == 0


def test_runc_finds_our_profile_good(tmp_path: Path) -> None:
    """The default profile is in the format of runtime-spec: another runtime takes it, and refuses what we refuse."""
    needs("runc", "busybox")
    import json
    import shutil

    (tmp_path / "rootfs" / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tmp_path / "rootfs" / "bin" / "busybox")
    subprocess.run(["runc", "spec"], cwd=tmp_path, check=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["process"]["terminal"] = False
    config["process"]["args"] = ["/bin/busybox", "unshare", "-U", "true"]
    config["linux"]["seccomp"] = default()
    config["linux"]["cgroupsPath"] = name = f"/ocidtest-runc-{os.getpid()}"
    config["process"]["rlimits"] = []
    config["process"].pop("oomScoreAdj", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["runc", "--root", str(tmp_path / "state"), "run", name.strip("/")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "Operation not permitted" in done.stderr, done
