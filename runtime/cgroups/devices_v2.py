"""A device policy as the eBPF program of a v2 cgroup (BPF_PROG_TYPE_CGROUP_DEVICE).

Refuses to leave two programs behind: each of them would have to say yes for ever (threats O61). Invariant: the new
program is in force before the old one is gone, in one system call where there is one old one.
"""

from __future__ import annotations

import os

from runtime.linux import bpf

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from runtime.cgroups.devices import Key, Policy

# linux/bpf_common.h and linux/bpf.h
_LDX_W, _ALU64_AND_K, _ALU64_RSH_K, _MOV64_K, _MOV64_X, _AND64_K = 0x61, 0x57, 0x77, 0xB7, 0xBF, 0x57
_JNE_K32, _JEQ_K32, _EXIT = 0x56, 0x16, 0x95  # BPF_JMP32: a major number may use all 32 bits
_R0, _R1, _TYPE, _ACCESS, _MAJOR, _MINOR, _SCRATCH = 0, 1, 2, 3, 4, 5, 6
# linux/bpf.h: struct bpf_cgroup_dev_ctx and its bits
_DEVICE_BITS = {"b": 1, "c": 2}
_ACCESS_BITS = {"m": 1, "r": 2, "w": 4}


def program(wanted: Policy) -> bytes:
    """eBPF: the first exception that matches decides, else the default. Returns 1 to allow, 0 for EPERM."""
    code = [
        bpf.insn(_LDX_W, _TYPE, _R1, 0),
        bpf.insn(_MOV64_X, _ACCESS, _TYPE),
        bpf.insn(_ALU64_AND_K, _TYPE, imm=0xFFFF),
        bpf.insn(_ALU64_RSH_K, _ACCESS, imm=16),
        bpf.insn(_LDX_W, _MAJOR, _R1, 4),
        bpf.insn(_LDX_W, _MINOR, _R1, 8),
    ]
    for key, held in wanted.exceptions:
        code += _exception(key, held, allow=not wanted.allow)
    code += [bpf.insn(_MOV64_K, _R0, imm=int(wanted.allow)), bpf.insn(_EXIT)]
    return b"".join(code)


def _exception(key: Key, held: str, *, allow: bool) -> list[bytes]:
    kind, major, minor = key
    bits = sum(_ACCESS_BITS[letter] for letter in held)
    tests = [(_JNE_K32, _TYPE, _DEVICE_BITS[kind])]
    if major >= 0:
        tests.append((_JNE_K32, _MAJOR, major))
    if minor >= 0:
        tests.append((_JNE_K32, _MINOR, minor))
    body: list[tuple[int, int, int]] = list(tests)
    prefix = []
    if bits != 7:
        # To allow, nothing beyond the exception may be asked for; to deny, anything in it is enough.
        prefix = [
            bpf.insn(_MOV64_X, _SCRATCH, _ACCESS),
            bpf.insn(_AND64_K, _SCRATCH, imm=~bits & 7 if allow else bits),
        ]
        body.append((_JNE_K32 if allow else _JEQ_K32, _SCRATCH, 0))
    verdict = [bpf.insn(_MOV64_K, _R0, imm=int(allow)), bpf.insn(_EXIT)]
    lines: list[bytes] = []
    total = len(body) + len(prefix) + len(verdict)
    for jump, register, value in body:
        if register == _SCRATCH:
            lines += prefix
        lines.append(bpf.insn(jump, register, off=total - len(lines) - 1, imm=value))
    return lines + verdict


def attach(cgroup_fd: int, wanted: Policy) -> None:
    """Puts the program of `wanted` on a v2 cgroup in place of the one there; a failure leaves the old one in force.

    Programs of several owners all have to say yes, so one left behind would keep an old refusal in force for ever:
    several (left by another runtime, or by a kill in between) are all taken off once the new one is on.
    """
    new = bpf.bpf_prog_load_device(program(wanted))
    held = [new]
    try:
        for number in bpf.bpf_prog_query(cgroup_fd):
            held.append(bpf.bpf_prog_get_fd_by_id(number))
        old = held[1:]
        bpf.bpf_prog_attach(cgroup_fd, new, old[0] if len(old) == 1 else -1)
        if len(old) > 1:
            for fd in old:
                bpf.bpf_prog_detach(cgroup_fd, fd)
    finally:
        _close_all(held)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
