"""seccomp: every action, operator and flag, seen by what a shell may still do; and supervisors over a listener."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from typing import Any

from conformance.harness import kernel
from conformance.harness.box import Box, listen
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group

case = Group("seccomp").case

MKDIR = ["mkdir", "mkdirat"]
ARCHITECTURES = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
# What a shell of busybox, and a runtime between the filter and execve, cannot do without.
NEEDED = (  # noqa: SIM905 (a paragraph of names reads better than a page of quotes)
    "access arch_prctl brk capget capset chdir clone clone3 close close_range dup dup2 dup3 epoll_create1 epoll_ctl "
    "epoll_pwait eventfd2 execve execveat exit exit_group faccessat faccessat2 fchdir fcntl fork fstat fstatfs futex "
    "getcwd getdents64 getegid geteuid getgid getgroups getpgrp getpid getppid getrandom getrlimit getsid gettid "
    "gettimeofday getuid ioctl kill lseek lstat madvise mmap mprotect mremap munmap nanosleep clock_nanosleep "
    "newfstatat open openat openat2 pipe pipe2 poll ppoll prctl pread64 prlimit64 pselect6 read readlink readlinkat "
    "recvfrom recvmsg rseq rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend sched_getaffinity sched_yield "
    "seccomp select sendmsg sendto set_robust_list set_tid_address setgid setgroups setsid setuid sigaltstack socket "
    "stat statx sysinfo tgkill time umask uname vfork wait4 waitid write writev"
).split()


def filtered(one: Bundle, *rules: dict[str, Any], default: str = "SCMP_ACT_ALLOW", **fields: Any) -> Bundle:
    """The bundle with a filter; rules are those of linux.seccomp.syscalls."""
    one.linux["seccomp"] = {
        "defaultAction": default,
        "architectures": ARCHITECTURES[:3] if os.uname().machine == "x86_64" else ARCHITECTURES[3:],
        "syscalls": list(rules),
        **fields,
    }
    return one


def rule(names: list[str], action: str, *args: tuple[int, int, str], **fields: Any) -> dict[str, Any]:
    """One entry; args are (index, value, operator without SCMP_CMP_)."""
    found: dict[str, Any] = {"names": names, "action": action, **fields}
    if args:
        found["args"] = [{"index": index, "value": value, "op": f"SCMP_CMP_{op}"} for index, value, op in args]
    return found


MAKE = "mkdir /tmp/made"


@case()
def errno_is_eperm_by_default(box: Box) -> None:
    one = filtered(box.sh(MAKE), rule(MKDIR, "SCMP_ACT_ERRNO"))
    assert "Operation not permitted" in one.run().failed()
    assert not (one.rootfs / "tmp/made").exists()


@case()
def errno_of_the_rule(box: Box) -> None:
    one = filtered(box.sh(MAKE), rule(MKDIR, "SCMP_ACT_ERRNO", errnoRet=28))
    assert "No space left on device" in one.run().failed()


@case()
def default_action_errno_with_a_list_of_what_is_allowed(box: Box) -> None:
    one = filtered(box.sh(f"echo ran; {MAKE}"), rule(NEEDED, "SCMP_ACT_ALLOW"), default="SCMP_ACT_ERRNO")
    said = one.run()
    assert said.text == "ran\n" and "Operation not permitted" in said.error, said


@case()
def default_errno(box: Box) -> None:
    one = filtered(box.sh(MAKE), rule(NEEDED, "SCMP_ACT_ALLOW"), default="SCMP_ACT_ERRNO", defaultErrnoRet=13)
    assert "Permission denied" in one.run().failed()


@case()
def kill_process(box: Box) -> None:
    one = filtered(box.sh(f"sh -c '{MAKE}'; echo $?"), rule(MKDIR, "SCMP_ACT_KILL_PROCESS"))
    assert one.run().ok() == "159\n"


@case()
def kill_and_kill_thread(box: Box) -> None:
    for action in ("SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD"):
        assert filtered(box.sh(f"sh -c '{MAKE}'; echo $?"), rule(MKDIR, action)).run().ok() == "159\n", action


@case()
def trap(box: Box) -> None:
    assert filtered(box.sh(f"sh -c '{MAKE}'; echo $?"), rule(MKDIR, "SCMP_ACT_TRAP")).run().ok() == "159\n"


@case()
def trace_without_a_tracer(box: Box) -> None:
    said = filtered(box.sh(MAKE), rule(MKDIR, "SCMP_ACT_TRACE")).run()
    assert "Function not implemented" in said.failed()


@case()
def log_lets_it_pass(box: Box) -> None:
    one = filtered(box.sh(MAKE), rule(MKDIR, "SCMP_ACT_LOG"))
    one.run().ok()
    assert (one.rootfs / "tmp/made").is_dir()


@case()
def the_filter_is_on_the_process(box: Box) -> None:
    one = filtered(box.bundle(), rule(MKDIR, "SCMP_ACT_ERRNO")).up()
    assert kernel.status(one.pid())["Seccomp"] == "2"


@case()
def there_is_no_filter_without_one_in_the_config(box: Box) -> None:
    assert kernel.status(box.bundle().up().pid())["Seccomp"] == kernel.status(os.getpid())["Seccomp"]


@case()
def without_no_new_privileges(box: Box) -> None:
    one = filtered(box.sh(MAKE), rule(MKDIR, "SCMP_ACT_ERRNO"))
    one.process["noNewPrivileges"] = False
    one.process["user"] = {"uid": 1000, "gid": 1000}
    one.run().failed("Operation not permitted")


@case()
def exec_has_the_filter_too(box: Box) -> None:
    one = filtered(box.bundle(), rule(MKDIR, "SCMP_ACT_ERRNO")).up()
    one.exec("mkdir", "/tmp/made").failed("Operation not permitted")


# ------------------------------------------------------------------------------------------------------- arguments
# kill's second argument is a signal, and a shell chooses it. 10 is SIGUSR1, 12 is SIGUSR2, 23 is SIGURG, 28 SIGWINCH.

SIGNALS = (10, 12, 23, 28)


def denied(box: Box, *args: tuple[int, int, str]) -> list[int]:
    """Which of SIGNALS a shell cannot send to itself under a rule with these arguments."""
    # What arrives is ignored, so that only what the filter says is seen.
    script = "trap '' 10 12 23 28; for s in 10 12 23 28; do kill -$s $$ 2>/dev/null || echo $s; done; true"
    return [int(line) for line in filtered(box.sh(script), rule(["kill"], "SCMP_ACT_ERRNO", *args)).run().lines()]


@case()
def operator_equal(box: Box) -> None:
    assert denied(box, (1, 12, "EQ")) == [12]


@case()
def operator_not_equal(box: Box) -> None:
    assert denied(box, (1, 12, "NE")) == [10, 23, 28]


@case()
def operators_less(box: Box) -> None:
    assert denied(box, (1, 12, "LT")) == [10]
    assert denied(box, (1, 12, "LE")) == [10, 12]


@case()
def operators_greater(box: Box) -> None:
    assert denied(box, (1, 23, "GT")) == [28]
    assert denied(box, (1, 23, "GE")) == [23, 28]


@case()
def operator_masked_equal(box: Box) -> None:
    one = box.sh("trap '' 10 12 23 28; for s in 10 12 23 28; do kill -$s $$ 2>/dev/null || echo $s; done; true")
    entry = rule(["kill"], "SCMP_ACT_ERRNO")
    # Bit 3 (value 8) is set in 10, 12 and 28, bit 2 (value 4) in 12, 23 and 28.
    entry["args"] = [{"index": 1, "value": 12, "valueTwo": 8, "op": "SCMP_CMP_MASKED_EQ"}]
    assert filtered(one, entry).run().lines() == ["10"]


@case()
def arguments_of_one_rule_must_all_hold(box: Box) -> None:
    # The first argument is the shell's own pid, 1 in its namespace.
    assert denied(box, (0, 1, "EQ"), (1, 12, "EQ")) == [12]
    assert denied(box, (0, 2, "EQ"), (1, 12, "EQ")) == []


@case()
def several_conditions_on_one_argument_are_alternatives(box: Box) -> None:
    assert denied(box, (1, 10, "EQ"), (1, 28, "EQ")) == [10, 28]


@case()
def several_rules_for_one_call(box: Box) -> None:
    one = box.sh("trap '' 10 12; kill -10 $$; kill -12 $$; true")
    rules = [rule(["kill"], "SCMP_ACT_ERRNO", (1, 10, "EQ"), errnoRet=28)]
    rules.append(rule(["kill"], "SCMP_ACT_ERRNO", (1, 12, "EQ"), errnoRet=13))
    said = filtered(one, *rules).run().error.splitlines()
    assert len(said) == 2 and "No space left" in said[0] and "Permission denied" in said[1], said


# -------------------------------------------------------------------------------------------------- what is refused


@case()
def an_action_that_is_none(box: Box) -> None:
    filtered(box.bundle(), rule(MKDIR, "SCMP_ACT_NONSENSE")).create().failed("SCMP_ACT_NONSENSE")


@case()
def an_operator_that_is_none(box: Box) -> None:
    filtered(box.bundle(), rule(MKDIR, "SCMP_ACT_ERRNO", (0, 1, "NONSENSE"))).create().failed("SCMP_CMP_NONSENSE")


@case()
def an_architecture_that_is_none(box: Box) -> None:
    one = filtered(box.bundle(), rule(MKDIR, "SCMP_ACT_ERRNO"), architectures=["SCMP_ARCH_NONSENSE"])
    one.create().failed("SCMP_ARCH_NONSENSE")


@case()
def a_call_that_nobody_knows_is_ignored(box: Box) -> None:
    one = filtered(box.sh(MAKE), rule(["nonsense_call", *MKDIR], "SCMP_ACT_ERRNO"))
    one.run().failed("Operation not permitted")


@case()
def a_flag_that_nobody_knows(box: Box) -> None:
    filtered(box.bundle(), rule(MKDIR, "SCMP_ACT_ERRNO"), flags=["SECCOMP_FILTER_FLAG_NONSENSE"]).create().failed(
        "flag"
    )


@case()
def flags(box: Box) -> None:
    names = ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]
    one = filtered(box.bundle(), rule(MKDIR, "SCMP_ACT_ERRNO"), flags=names).up()
    assert kernel.status(one.pid())["Seccomp"] == "2"


@case()
def spec_allow_leaves_speculation_alone(box: Box) -> None:
    one = filtered(box.bundle(), rule(MKDIR, "SCMP_ACT_ERRNO"), flags=["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]).up()
    key = "Speculation_Store_Bypass"
    assert kernel.status(one.pid())[key] == kernel.status(os.getpid())[key]


# --------------------------------------------------------------------------------------------------------- listeners

NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101
NOTIF_SIZE, CONTINUE = 80, 1


def notified(box: Box, one: Bundle) -> Bundle:
    """mkdir asks a supervisor on our socket."""
    return filtered(
        one,
        rule(MKDIR, "SCMP_ACT_NOTIFY"),
        listenerPath=str(box.path("listener")),
        listenerMetadata="some metadata",
    )


def receive_listener(listener: socket.socket) -> tuple[dict[str, Any], int]:
    """The container process state that a runtime sends, and the descriptor of the filter."""
    listener.settimeout(15)
    connection, _ = listener.accept()
    with connection:
        data, descriptors, _, _ = socket.recv_fds(connection, 65536, 4)
    assert len(descriptors) == 1
    return json.loads(data), descriptors[0]


def answer(descriptor: int, *, error: int = 0, flags: int = 0) -> int:
    """Takes one question of the filter and answers it; the pid that asked."""
    question = bytearray(NOTIF_SIZE)
    fcntl.ioctl(descriptor, NOTIF_RECV, question)
    identity, pid = struct.unpack_from("<QI", question)
    fcntl.ioctl(descriptor, NOTIF_SEND, struct.pack("<QqiI", identity, 0, -error, flags))
    return int(pid)


@case()
def notify_tells_the_supervisor_of_the_container(box: Box) -> None:
    with listen(box.path("listener")) as listener:
        one = notified(box, box.bundle())
        one.create().ok()
        state, descriptor = receive_listener(listener)
        os.close(descriptor)
    assert state["fds"] == ["seccompFd"] and state["metadata"] == "some metadata", state
    assert state["state"]["id"] == one.id and state["pid"] == one.pid()
    assert state["state"]["status"] == "creating" and state["state"]["bundle"] == str(one.path)


@case()
def a_supervisor_that_refuses(box: Box) -> None:
    with listen(box.path("listener")) as listener:
        child = notified(box, box.sh(f"{MAKE} 2> /tmp/said; echo $? >> /tmp/said")).running()
        _, descriptor = receive_listener(listener)
        answer(descriptor, error=28)
        assert child.wait(20) == 0
        os.close(descriptor)
    said = (box.last_bundle().rootfs / "tmp/said").read_text()
    assert "No space left on device" in said and said.endswith("1\n"), said


@case()
def a_supervisor_that_lets_it_pass(box: Box) -> None:
    with listen(box.path("listener")) as listener:
        child = notified(box, box.sh(MAKE)).running()
        _, descriptor = receive_listener(listener)
        answer(descriptor, flags=CONTINUE)
        assert child.wait(20) == 0
        os.close(descriptor)
    assert (box.last_bundle().rootfs / "tmp/made").is_dir()


@case()
def exec_has_a_listener_of_its_own(box: Box) -> None:
    with listen(box.path("listener")) as listener:
        one = notified(box, box.bundle())
        one.create().ok()
        os.close(receive_listener(listener)[1])
        one.start().ok()
        child = box.popen("exec", one.id, "mkdir", "/tmp/made")
        state, descriptor = receive_listener(listener)
        assert state["state"]["id"] == one.id
        answer(descriptor, flags=CONTINUE)
        assert child.wait(20) == 0
        os.close(descriptor)


@case()
def notify_without_a_listener_is_refused(box: Box) -> None:
    filtered(box.bundle(), rule(MKDIR, "SCMP_ACT_NOTIFY")).create().failed("listenerPath")


@case()
def notify_where_nobody_listens(box: Box) -> None:
    notified(box, box.bundle()).create().failed("no such file or directory")


@case()
def notify_for_write_is_refused(box: Box) -> None:
    one = filtered(box.bundle(), rule(["write"], "SCMP_ACT_NOTIFY"), listenerPath=str(box.path("listener")))
    with listen(box.path("listener")):
        one.create().failed("write")


@case()
def notify_as_the_default_is_refused(box: Box) -> None:
    with listen(box.path("listener")):
        one = filtered(box.bundle(), default="SCMP_ACT_NOTIFY", listenerPath=str(box.path("listener")))
        one.create().failed("SCMP_ACT_NOTIFY")
