"""A seccomp profile as classic BPF: libseccomp's filter, and a short prelude of ours before it.

The prelude settles three things: a system call that is newer than any the profile names fails with ENOSYS, so that
programs fall back to what they used before; a call that the profile allows but this libseccomp has never heard of is
allowed; and a conditional rule is not widened by 32-bit multiplexers (threats S48). Refuses programs that the kernel
would not take. Invariant: what the prelude does not decide, libseccomp's filter decides alone.
"""

from __future__ import annotations

import errno
import struct

from runtime.errors import RuntimeFailure
from runtime.linux import libseccomp
from runtime.linux.libc import KernelError
from runtime.seccomp import MAX_INSTRUCTIONS, Rule, Seccomp

_ENOSYS = libseccomp.SCMP_ACT_ERRNO | errno.ENOSYS
_PERMISSIVE = (libseccomp.SCMP_ACT_TRACE, libseccomp.SCMP_ACT_LOG, libseccomp.SCMP_ACT_ALLOW)
# Since 424 all architectures share their numbers (Documentation/process/adding-syscalls.rst): what a libseccomp of an
# older day does not resolve can be told to the kernel by number all the same.
_NEWER = {
    "cachestat": 451,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "statmount": 457,
    "listmount": 458,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,
    "file_getattr": 468,
    "file_setattr": 469,
}
# Which architectures one kernel can run; rules for the others would only make the filter longer.
_FAMILIES = (
    ("x86_64", "x86", "x32"),
    ("aarch64", "arm"),
    ("s390x", "s390"),
    ("ppc64", "ppc"),
    ("ppc64le",),
    ("riscv64",),
)
_X32_BIT, _TOKEN_X86_64, _TOKEN_X32 = 0x40000000, 0xC000003E, 0x4000003E
# A multiplexer, the pseudo numbers that libseccomp gives its calls on such an architecture, and where its selector is.
_MULTIPLEXERS = (("socketcall", -120, -100, 0xFFFFFFFF), ("ipc", -224, -200, 0xFFFF))


def compile_profile(profile: Seccomp) -> bytes:
    """The profile as struct sock_filter[]. Raises RuntimeFailure."""
    try:
        tokens = _tokens(profile)
        prelude = _prelude(profile, tokens)
        with libseccomp.Filter(profile.default_action) as filter_:
            for token in tokens[1:]:
                filter_.add_arch(token)
            if sum(len(rule.names) for rule in profile.rules) > 32:
                # Below that a list is as good, and libseccomp before 2.5.5 trips over a tree without leaves.
                filter_.optimize()
            for rule in profile.rules:
                _add(filter_, rule, profile.default_action)
            code = prelude + filter_.export()
    except KernelError as error:
        failure = RuntimeFailure.of(error, step="seccomp", what="compile linux.seccomp")
        if error.call == "dlopen":
            failure.hint = "install libseccomp (Debian: libseccomp2)"
        raise failure from error
    if len(code) // 8 > MAX_INSTRUCTIONS:
        raise RuntimeFailure(
            f"compile linux.seccomp: {len(code) // 8} instructions, and the kernel takes {MAX_INSTRUCTIONS}",
            step="seccomp",
            hint="name fewer architectures or conditions",
            code="invalid_argument",
        )
    return code


def _tokens(profile: Seccomp) -> list[int]:
    """The native architecture first, then the others of the profile whose programs can run here at all."""
    native = libseccomp.native_token()
    family = next((names for names in _FAMILIES if native in map(libseccomp.arch_token, names)), ())
    tokens = [native]
    for name in profile.architectures:
        if family and name not in family:
            continue
        token = libseccomp.arch_token(name)
        if not token:
            raise RuntimeFailure(
                f"linux.seccomp.architectures: libseccomp {libseccomp.version()} knows no {name}",
                step="seccomp",
                code="invalid_argument",
            )
        if token not in tokens:
            tokens.append(token)
    return tokens


def _add(filter_: libseccomp.Filter, rule: Rule, default: int) -> None:
    if rule.action == default:
        return  # says nothing, and libseccomp refuses it (EACCES)
    conditions = tuple((one.index, one.operator, one.value, one.second) for one in rule.arguments)
    # All conditions must hold; but several on one argument are alternatives, because the first runtimes had it so and
    # profiles rely on it.
    several = len({one.index for one in rule.arguments}) < len(conditions)
    alternatives = [(condition,) for condition in conditions] if several else [conditions]
    for name in rule.names:
        number = libseccomp.syscall_number(name)
        if number is None:
            continue  # of a future kernel, for which the prelude cares, or of none
        for alternative in alternatives:
            filter_.add_rule(rule.action, number, alternative)


def _restrictive(action: int) -> bool:
    return action & 0xFFFF0000 not in _PERMISSIVE


# linux/bpf_common.h, linux/filter.h; offsets in struct seccomp_data
_LD, _JEQ, _JGT, _JGE, _JA, _AND, _RET = 0x20, 0x15, 0x25, 0x35, 0x05, 0x54, 0x06
_AT_NUMBER, _AT_ARCH, _AT_FIRST_ARGUMENT = 0, 4, 16


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _prelude(profile: Seccomp, tokens: list[int]) -> bytes:
    """What is settled before libseccomp's filter: for each architecture, by its number; all else falls through."""
    blocks: dict[int, list[bytes]] = {}
    for token in tokens:
        audit = _TOKEN_X86_64 if token == _TOKEN_X32 else token  # x32 is told from x86_64 by a bit of the number
        blocks.setdefault(audit, []).append(_block(profile, token))
    code = b""
    for audit, parts in blocks.items():
        body = _instruction(_LD, _AT_NUMBER) + b"".join(parts)
        # A conditional jump reaches 255 instructions; the body may be longer, so it is left out by a jump always.
        code += _instruction(_LD, _AT_ARCH) + _instruction(_JEQ, audit, 1, 0)
        code += _instruction(_JA, len(body) // 8) + body
    return code


def _block(profile: Seccomp, token: int) -> bytes:
    """The part for one architecture, entered and left with the number in the accumulator."""
    base = _X32_BIT if token == _TOKEN_X32 else 0
    last, extra = _numbers(profile, token)
    code = b""
    for number, action in sorted(extra.items()):
        code += _instruction(_JEQ, number, 0, 1) + _instruction(_RET, action)
    for number, mask, selector in _widened(profile, token):
        code += _instruction(_JEQ, number, 0, 5) + _instruction(_LD, _AT_FIRST_ARGUMENT) + _instruction(_AND, mask)
        code += _instruction(_JEQ, selector, 0, 1) + _instruction(_RET, profile.default_action)
        code += _instruction(_LD, _AT_NUMBER)
    if last is not None and _restrictive(profile.default_action) and profile.default_action != _ENOSYS:
        code += _instruction(_JGT, last, 0, 1) + _instruction(_RET, _ENOSYS)
        if token == _TOKEN_X86_64:
            # Numbers of x32 are larger than any of x86_64: they are for the next block, or for libseccomp to refuse.
            code = code[:-16] + _instruction(_JGE, _X32_BIT, 2, 0) + code[-16:]
        elif base:
            code = code[:-16] + _instruction(_JGE, base, 0, 2) + code[-16:]
    return code


def _numbers(profile: Seccomp, token: int) -> tuple[int | None, dict[int, int]]:
    """The highest number that the profile names on an architecture, and the actions for calls libseccomp cannot name:
    whoever wrote the profile knew the kernel up to there, and has decided about all of it."""
    base = _X32_BIT if token == _TOKEN_X32 else 0
    last: int | None = None
    extra: dict[int, int] = {}
    for rule in profile.rules:
        for name in rule.names:
            number = libseccomp.syscall_number(name, token)
            if number is None and name in _NEWER:
                number = _NEWER[name] + base
                if not rule.arguments and rule.action != profile.default_action:
                    extra[number] = rule.action
            if number is not None and number >= 0 and (last is None or number > last):
                last = number
    return last, extra


def _widened(profile: Seccomp, token: int) -> list[tuple[int, int, int]]:
    """(multiplexer, mask, selector) of calls that are allowed under conditions which a multiplexer hides.

    i386 has socket(2) also as socketcall(2), whose arguments are behind a pointer: libseccomp allows that way without
    the conditions. A profile that names the multiplexer itself has decided; else the default action holds there.
    """
    if not _restrictive(profile.default_action):
        return []
    named = {name for rule in profile.rules for name in rule.names}
    found = []
    for multiplexer, low, high, mask in _MULTIPLEXERS:
        number = libseccomp.syscall_number(multiplexer, token)
        if number is None or number < 0 or multiplexer in named:
            continue
        selectors = set()
        for rule in profile.rules:
            if not rule.arguments or _restrictive(rule.action):
                continue
            for name in rule.names:
                pseudo = libseccomp.syscall_number(name, token)
                if pseudo is not None and low <= pseudo < high:
                    selectors.add(high - pseudo)
        found += [(number, mask, selector) for selector in sorted(selectors)]
    return found
