"""linux.seccomp of a container, as the kernel and the container's own calls show it."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cri.spec import security
from tests.bundles import Bundle, Bundles, bundles
from tests.probes import answers, asking, interpreter, python
from tests.support import needs

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers below are x86_64's")
GETPPID, GETPGRP, GETPRIORITY, GETPID, TUXCALL = 110, 111, 140, 39, 184


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def allow_but(*rules: dict[str, Any], **fields: object) -> dict[str, Any]:
    """A profile that allows what no rule is about."""
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": list(rules), **fields}


def rule(action: str, *names: str, **fields: object) -> dict[str, Any]:
    return {"names": list(names), "action": action, **fields}


def status(text: str) -> dict[str, str]:
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def confined(home: Bundles, profile: dict[str, Any], *calls: tuple[int, ...]) -> list[int]:
    """What a container under `profile` is answered."""
    one = asking(home.make(), calls)
    one.linux["seccomp"] = profile
    return answers(one.run())


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_a_filter_is_in_force_for_the_process_and_for_an_exec(home: Bundles, no_new_privileges: bool) -> None:
    one = home.make()
    one.process["noNewPrivileges"] = no_new_privileges
    one.linux["seccomp"] = allow_but(rule("SCMP_ACT_ERRNO", "mkdir", "mkdirat", errnoRet=errno.EXDEV))
    one.up()
    held = status(Path(f"/proc/{one.pid()}/status").read_text())
    assert held["Seccomp"] == "2" and held["Seccomp_filters"] == "1"
    assert held["NoNewPrivs"] == str(int(no_new_privileges))
    joined = status(one.exec("cat", "/proc/self/status").ok())
    assert joined["Seccomp"] == "2" and joined["Seccomp_filters"] == "1"
    one.exec("mkdir", "/tmp/x").failed("Invalid cross-device link")


def test_no_profile_no_filter(home: Bundles) -> None:
    assert status(home.make("cat", "/proc/self/status").run().ok())["Seccomp"] == "0"


def test_errno_of_a_rule_and_of_the_rest(home: Bundles) -> None:
    profile = security.default_seccomp(security.DEFAULT_CAPABILITIES)
    profile["defaultErrnoRet"] = errno.EBADMSG
    refused = rule("SCMP_ACT_ERRNO", "getpgrp", errnoRet=errno.EDOM)
    kept = [each for each in profile["syscalls"] if "getpgrp" not in each["names"]]
    allowed = [{**each, "names": [n for n in each["names"] if n != "getpgrp"]} for each in profile["syscalls"]]
    profile["syscalls"] = [refused, *allowed]
    assert len(kept) < len(allowed), "the default profile is expected to name getpgrp"
    found = confined(home, profile, (GETPGRP,), (TUXCALL,), (GETPPID,))
    assert found == [-errno.EDOM, -errno.EBADMSG, 0]


def test_errno_without_a_number_is_eperm_and_zero_is_a_success(home: Bundles) -> None:
    found = confined(
        home,
        allow_but(rule("SCMP_ACT_ERRNO", "getpgrp"), rule("SCMP_ACT_ERRNO", "getpid", errnoRet=0)),
        (GETPGRP,),
        (GETPID,),
    )
    assert found == [-errno.EPERM, 0]  # its pid would be 1


@pytest.mark.parametrize(
    ("op", "value", "second", "refused"),
    [
        ("SCMP_CMP_EQ", 5, 0, [5]),
        ("SCMP_CMP_NE", 5, 0, [4, 6, 0x105]),
        ("SCMP_CMP_LT", 5, 0, [4]),
        ("SCMP_CMP_LE", 5, 0, [4, 5]),
        ("SCMP_CMP_GE", 5, 0, [5, 6, 0x105]),
        ("SCMP_CMP_GT", 5, 0, [6, 0x105]),
        ("SCMP_CMP_MASKED_EQ", 0xFF, 5, [5, 0x105]),
    ],
)
def test_operators(home: Bundles, op: str, value: int, second: int, refused: list[int]) -> None:
    condition = {"index": 1, "op": op, "value": value, "valueTwo": second}
    profile = allow_but(rule("SCMP_ACT_ERRNO", "getpriority", errnoRet=77, args=[condition]))
    tried = [4, 5, 6, 0x105]
    # `which` 9 is none of getpriority's: the kernel's own answer is EINVAL.
    found = confined(home, profile, *((GETPRIORITY, 9, each) for each in tried))
    assert [number for number, answer in zip(tried, found, strict=True) if answer == -77] == refused
    assert set(found) <= {-77, -errno.EINVAL}


def test_conditions_on_two_arguments_both_hold_and_on_one_either(home: Bundles) -> None:
    def condition(index: int, value: int) -> dict[str, Any]:
        return {"index": index, "op": "SCMP_CMP_EQ", "value": value}

    both = allow_but(rule("SCMP_ACT_ERRNO", "getpriority", errnoRet=77, args=[condition(0, 9), condition(1, 5)]))
    assert confined(home, both, (GETPRIORITY, 9, 5), (GETPRIORITY, 9, 6)) == [-77, -errno.EINVAL]
    either = allow_but(rule("SCMP_ACT_ERRNO", "getpriority", errnoRet=77, args=[condition(1, 5), condition(1, 6)]))
    found = confined(home, either, (GETPRIORITY, 9, 5), (GETPRIORITY, 9, 6), (GETPRIORITY, 9, 7))
    assert found == [-77, -77, -errno.EINVAL]


@pytest.mark.parametrize("action", ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"])
def test_actions_that_end_a_process(home: Bundles, action: str) -> None:
    one = asking(home.make(), [(GETPPID,)])
    one.linux["seccomp"] = allow_but(rule(action, "getppid"))
    assert one.run().code == 128 + signal.SIGSYS


def test_trap_is_a_signal_that_can_be_caught(home: Bundles) -> None:
    one = interpreter(home.make())
    one.process["args"] = python(
        "import signal\n"
        "seen = []\n"
        "signal.signal(signal.SIGSYS, lambda *_: seen.append(1))\n"
        f"call({GETPPID})\n"
        "print(len(seen))\n"
    )
    one.linux["seccomp"] = allow_but(rule("SCMP_ACT_TRAP", "getppid"))
    assert one.run().ok() == "1\n"


def test_kill_thread_takes_one_thread_and_kill_process_all(home: Bundles) -> None:
    script = (
        "import _thread, time\n"
        f"_thread.start_new_thread(call, ({GETPPID},))\n"
        "while len(os.listdir('/proc/self/task')) > 1: time.sleep(0.01)\n"
        "print('alive', flush=True)\n"
    )
    for action, code, text in (("SCMP_ACT_KILL_THREAD", 0, "alive\n"), ("SCMP_ACT_KILL_PROCESS", 159, "")):
        one = interpreter(home.make())
        one.process["args"] = python(script)
        one.linux["seccomp"] = allow_but(rule(action, "getppid"))
        result = one.run()
        assert (result.code, result.text) == (code, text), action


def test_trace_without_a_tracer_and_log(home: Bundles) -> None:
    profile = allow_but(rule("SCMP_ACT_TRACE", "getppid", errnoRet=7), rule("SCMP_ACT_LOG", "getpgrp"))
    found = confined(home, profile, (GETPPID,), (GETPGRP,))
    assert found[0] == -errno.ENOSYS and found[1] >= 0


def test_calls_newer_than_the_profile_are_enosys_and_unknown_names_pass(home: Bundles) -> None:
    profile = security.default_seccomp(security.DEFAULT_CAPABILITIES)
    profile["syscalls"].append(rule("SCMP_ACT_ALLOW", "a_call_of_tomorrow"))
    found = confined(home, profile, (9999,), (600,), (TUXCALL,), (GETPPID,))
    assert found == [-errno.ENOSYS, -errno.ENOSYS, -errno.EPERM, 0]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["SECCOMP_FILTER_FLAG_LOG"],
        ["SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
        ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
        ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],  # is about listeners: without one it changes nothing
    ],
)
def test_flags(home: Bundles, flags: list[str]) -> None:
    one = home.make("cat", "/proc/self/status")
    one.linux["seccomp"] = allow_but(flags=flags)
    held = status(one.run().ok())
    assert held["Seccomp"] == "2"
    if "SECCOMP_FILTER_FLAG_SPEC_ALLOW" not in flags and "Speculation_Store_Bypass" in held:
        bare = status(home.make("cat", "/proc/self/status").run().ok())
        told = (bare["Speculation_Store_Bypass"], held["Speculation_Store_Bypass"])
        assert told[0] == told[1] or told[1] == "thread force mitigated", told


@pytest.mark.parametrize(
    "architectures",
    [
        ["SCMP_ARCH_X86_64"],
        ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        ["SCMP_ARCH_AARCH64", "SCMP_ARCH_S390X", "SCMP_ARCH_LOONGARCH64", "SCMP_ARCH_M68K", "SCMP_ARCH_SHEB"],
    ],
)
def test_architectures(home: Bundles, architectures: list[str]) -> None:
    refused = rule("SCMP_ACT_ERRNO", "getppid", errnoRet=77)
    assert confined(home, allow_but(refused, architectures=architectures), (GETPPID,), (GETPID,)) == [-77, 1]


def test_a_32_bit_call_dies_unless_the_profile_has_its_architecture(home: Bundles) -> None:
    # mov eax, 20 (getpid of i386); int 0x80; ret
    script = (
        "import mmap\n"
        "code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "code.write(bytes.fromhex('b814000000cd80c3'))\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())\n"
    )
    bare = interpreter(home.make())
    bare.process["args"] = python(script)
    if bare.run().text != "1\n":
        pytest.skip("this kernel runs no 32-bit calls")
    for architectures, code, text in ((["SCMP_ARCH_X86_64"], 159, ""), (["SCMP_ARCH_X86"], 0, "-77\n")):
        one = interpreter(home.make())
        one.process["args"] = python(script)
        refused = rule("SCMP_ACT_ERRNO", "getpid", errnoRet=77)
        one.linux["seccomp"] = allow_but(refused, architectures=architectures)
        result = one.run()
        assert (result.code, result.text) == (code, text), architectures


def test_s48_default_profile_of_the_cri_in_a_container_and_in_an_exec(home: Bundles) -> None:
    calls = [(41, family, kind, 0) for family, kind in ((38, 5), (40, 1), (2, 1), (1, 1))]
    one = asking(home.make(), calls)
    one.linux["seccomp"] = security.default_seccomp(security.DEFAULT_CAPABILITIES)
    found = answers(one.run())
    assert found[:2] == [-errno.EPERM, -errno.EPERM] and min(found[2:]) > 0
    script = one.process["args"]
    one.process["args"] = ["sleep", "1000"]
    one.up()
    found = answers(one.exec(*script))
    assert found[:2] == [-errno.EPERM, -errno.EPERM] and min(found[2:]) > 0


def test_s22_no_cgroup_is_mounted_in_a_new_user_namespace(home: Bundles) -> None:
    one = home.sh("unshare -UrCm mount -t cgroup -o memory none /tmp || echo refused")
    one.linux["seccomp"] = security.default_seccomp(security.DEFAULT_CAPABILITIES)
    result = one.run()
    assert result.text == "refused\n" and "unshare" in result.error


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({}, "linux.seccomp.defaultAction: is required"),
        (allow_but(rule("SCMP_ACT_NONE", "read")), "linux.seccomp.syscalls[0].action: expected one of"),
        (allow_but(rule("SCMP_ACT_ERRNO")), "linux.seccomp.syscalls[0].names: expected names"),
        (allow_but(rule("SCMP_ACT_ALLOW", "read", errnoRet=5)), "syscalls[0].errnoRet: means nothing"),
        (allow_but(flags=["SECCOMP_FILTER_FLAG_NO"]), "linux.seccomp.flags[0]: expected one of"),
        (allow_but(architectures=["SCMP_ARCH_VAX"]), "linux.seccomp.architectures[0]: expected one of"),
        (
            allow_but(rule("SCMP_ACT_ERRNO", "read", args=[{"index": 9, "op": "SCMP_CMP_EQ"}])),
            "linux.seccomp.syscalls[0].args[0].index: expected integer",
        ),
    ],
)
def test_s73_a_profile_that_cannot_be_is_refused_and_nothing_runs(
    home: Bundles, profile: dict[str, Any], words: str
) -> None:
    one = home.sh("echo ran > /tmp/ran")
    one.linux["seccomp"] = profile
    one.run().failed(words)
    assert not (one.rootfs / "tmp/ran").exists()
    one.gone()


def test_s73_a_filter_that_was_taken_away_lets_no_exec_in(home: Bundles) -> None:
    one: Bundle = home.make()
    one.linux["seccomp"] = allow_but(rule("SCMP_ACT_ERRNO", "mkdir", "mkdirat"))
    one.up()
    kept = home.root / one.id / "seccomp.bpf"
    program = kept.read_bytes()
    for damaged in (None, b"", program[:-1]):
        kept.unlink(missing_ok=True)
        if damaged is not None:
            kept.write_bytes(damaged)
        one.exec("true").failed("seccomp")
    kept.write_bytes(program)
    one.exec("true").ok()
