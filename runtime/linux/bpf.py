"""bpf(2) for device programs on cgroups: programs go in, fds come out.

Refuses to write a program: callers bring the instructions. Invariant: returned fds are CLOEXEC (the kernel makes every
bpf fd so) and the caller's. See bpf(2), linux/bpf.h.
"""

from __future__ import annotations

import struct

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError, syscall

# linux/bpf.h, enum bpf_cmd
BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_PROG_DETACH, BPF_PROG_GET_FD_BY_ID, BPF_PROG_QUERY = 5, 8, 9, 13, 16
BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE = 15, 6
BPF_F_ALLOW_MULTI, BPF_F_REPLACE = 2, 4

_QUERY_ROOM = 64  # the kernel's own BPF_CGROUP_MAX_PROGS


def insn(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """struct bpf_insn. An immediate above 2^31 is taken as the bit pattern it is."""
    return struct.pack("=BBhI", code, dst | src << 4, off, imm & 0xFFFFFFFF)


def bpf_prog_load_device(instructions: bytes, name: bytes = b"ocid_device") -> int:
    """BPF_PROG_LOAD of a cgroup device program. On failure the error ends with the verifier's last words."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    log = ctypes.create_string_buffer(16384)

    def attributes(level: int) -> bytes:
        where = ctypes.addressof(log) if level else 0
        size = len(log) if level else 0
        return struct.pack(
            "=IIQQIIQII16sII",
            BPF_PROG_TYPE_CGROUP_DEVICE,
            len(instructions) // 8,
            ctypes.addressof(code),
            ctypes.addressof(licence),
            level,
            size,
            where,
            0,
            0,
            name[:15],
            0,
            BPF_CGROUP_DEVICE,
        )

    attr = attributes(0)
    try:
        return syscall("bpf", BPF_PROG_LOAD, attr, len(attr), subject="load device program")
    except KernelError as first:
        attr = attributes(1)
        try:
            return syscall("bpf", BPF_PROG_LOAD, attr, len(attr), subject="load device program")
        except KernelError:
            first.subject += f" ({log.value.decode(errors='replace')[-200:].strip()})"
            raise first from None


def bpf_prog_attach(cgroup_fd: int, program_fd: int, replace_fd: int = -1) -> None:
    """BPF_PROG_ATTACH of a device program beside those of other owners (ALLOW_MULTI), or in place of `replace_fd`."""
    flags = BPF_F_ALLOW_MULTI | (BPF_F_REPLACE if replace_fd >= 0 else 0)
    attr = struct.pack("=5I", cgroup_fd, program_fd, BPF_CGROUP_DEVICE, flags, max(replace_fd, 0))
    syscall("bpf", BPF_PROG_ATTACH, attr, len(attr), subject=f"attach device program to fd {cgroup_fd}")


def bpf_prog_detach(cgroup_fd: int, program_fd: int) -> None:
    """BPF_PROG_DETACH of one device program."""
    attr = struct.pack("=5I", cgroup_fd, program_fd, BPF_CGROUP_DEVICE, 0, 0)
    syscall("bpf", BPF_PROG_DETACH, attr, len(attr), subject=f"detach device program from fd {cgroup_fd}")


def bpf_prog_query(cgroup_fd: int) -> tuple[int, ...]:
    """BPF_PROG_QUERY: the ids of the device programs attached to this very cgroup, oldest first."""
    ids = (ctypes.c_uint32 * _QUERY_ROOM)()
    # The kernel writes prog_cnt (and, from 6.6 on, a revision) back into the attributes.
    attr = ctypes.create_string_buffer(
        struct.pack("=IIIIQI36x", cgroup_fd, BPF_CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), _QUERY_ROOM)
    )
    syscall("bpf", BPF_PROG_QUERY, attr, 64, subject=f"query device programs of fd {cgroup_fd}")
    (count,) = struct.unpack_from("=I", attr.raw, 24)
    return tuple(ids[:count])


def bpf_prog_get_fd_by_id(number: int) -> int:
    """BPF_PROG_GET_FD_BY_ID."""
    attr = struct.pack("=III", number, 0, 0)
    return syscall("bpf", BPF_PROG_GET_FD_BY_ID, attr, len(attr), subject=f"program {number}")
