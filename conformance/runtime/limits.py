"""What a process may: capabilities, limits, priorities, processors; and the sysctls of its namespaces."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.cases import Group

case = Group("limits").case

CHOWN, KILL, SETUID, NET_BIND = (1 << bit for bit in (0, 5, 7, 10))


def is_running(pid: int) -> None:
    """Waits until the process of the container is the one that was asked for."""
    kernel.eventually(lambda: kernel.proc(pid, "comm") == "sleep\n", "execve")


# ------------------------------------------------------------------------------------------------------ capabilities


@case()
def capability_sets_are_exact(box: Box) -> None:
    one = box.bundle()
    one.process["capabilities"] = {
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID"],
        "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID"],
        "effective": ["CAP_CHOWN", "CAP_KILL"],
    }
    one.create().ok()
    pid = one.pid()
    one.start().ok()
    is_running(pid)
    # execve as root raises permitted and effective to what is bounding (capabilities(7)).
    assert kernel.caps(pid, "Bnd") == kernel.caps(pid, "Prm") == CHOWN | KILL | SETUID
    assert kernel.caps(pid, "Inh") == kernel.caps(pid, "Amb") == 0


@case()
def no_capabilities_at_all(box: Box) -> None:
    one = box.bundle()
    one.process["capabilities"] = {}
    pid = one.up().pid()
    assert [kernel.caps(pid, kind) for kind in ("Bnd", "Prm", "Eff", "Inh", "Amb")] == [0] * 5


@case()
def capabilities_of_another_user_are_gone_after_execve(box: Box) -> None:
    one = box.bundle()
    one.process["user"] = {"uid": 1000, "gid": 1000}
    pid = one.up().pid()
    is_running(pid)
    assert kernel.caps(pid, "Prm") == kernel.caps(pid, "Eff") == 0 != kernel.caps(pid, "Bnd")


@case()
def ambient_capabilities_survive_execve(box: Box) -> None:
    one = box.bundle()
    one.process["user"] = {"uid": 1000, "gid": 1000}
    one.capabilities("CAP_NET_BIND_SERVICE", kinds=("bounding", "permitted", "effective", "inheritable", "ambient"))
    pid = one.up().pid()
    is_running(pid)
    assert [kernel.caps(pid, kind) for kind in ("Bnd", "Prm", "Eff", "Inh", "Amb")] == [NET_BIND] * 5


@case()
def inheritable_capabilities_only_when_asked(box: Box) -> None:
    one = box.bundle().up()
    assert kernel.caps(one.pid(), "Inh") == 0
    two = box.bundle().capabilities("CAP_CHOWN", kinds=("bounding", "permitted", "effective", "inheritable")).up()
    assert kernel.caps(two.pid(), "Inh") == CHOWN


@case()
def a_missing_capability_is_missed(box: Box) -> None:
    said = box.sh("touch /tmp/x; chown 5:5 /tmp/x").capabilities("CAP_KILL").run()
    assert said.code != 0 and "Operation not permitted" in said.error


@case()
def an_unknown_capability_is_ignored_with_a_warning(box: Box) -> None:
    box.flags = ("--log", str(box.path("log")))
    one = box.bundle("true").capabilities("CAP_CHOWN", "CAP_NONSENSE")
    one.run().ok()
    assert "CAP_NONSENSE" in box.path("log").read_text()


@case()
def no_new_privileges(box: Box) -> None:
    one = box.bundle().up()
    assert kernel.status(one.pid())["NoNewPrivs"] == "1"
    two = box.bundle()
    two.process["noNewPrivileges"] = False
    assert kernel.status(two.up().pid())["NoNewPrivs"] == "0"


@case()
def file_capabilities_do_nothing_with_no_new_privileges(box: Box) -> None:
    for no_new_privileges, effective in ((True, 0), (False, NET_BIND)):
        one = box.bundle("/tmp/sleep", "1000").capabilities("CAP_NET_BIND_SERVICE", kinds=("bounding",))
        program = one.rootfs / "tmp/sleep"
        program.write_bytes(Path("/bin/busybox").read_bytes())
        program.chmod(0o755)
        # struct vfs_cap_data, revision 2, effective bit set: cap_net_bind_service=ep
        os.setxattr(program, "security.capability", struct.pack("<IIIII", 0x02000001, NET_BIND, 0, 0, 0))
        one.process["user"] = {"uid": 1000, "gid": 1000}
        one.process["noNewPrivileges"] = no_new_privileges
        pid = one.up().pid()
        is_running(pid)
        assert kernel.caps(pid, "Eff") == effective, no_new_privileges


# ------------------------------------------------------------------------------------------------ limits, priorities


@case()
def rlimits(box: Box) -> None:
    one = box.sh("ulimit -Si; ulimit -Hi; ulimit -Sc")
    one.process["rlimits"] = [
        {"type": "RLIMIT_SIGPENDING", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]
    assert one.run().lines() == ["100", "200", "0"]


@case()
def rlimits_of_every_kind(box: Box) -> None:
    rows = {
        "AS": "Max address space",
        "CORE": "Max core file size",
        "CPU": "Max cpu time",
        "DATA": "Max data size",
        "FSIZE": "Max file size",
        "LOCKS": "Max file locks",
        "MEMLOCK": "Max locked memory",
        "MSGQUEUE": "Max msgqueue size",
        "NICE": "Max nice priority",
        "NOFILE": "Max open files",
        "NPROC": "Max processes",
        "RSS": "Max resident set",
        "RTPRIO": "Max realtime priority",
        "RTTIME": "Max realtime timeout",
        "SIGPENDING": "Max pending signals",
        "STACK": "Max stack size",
    }
    limits = {line[:26].strip(): line[26:].split()[:2] for line in kernel.proc(os.getpid(), "limits").splitlines()}
    one = box.bundle()
    one.process["rlimits"] = []
    wanted = {}
    for name, row in rows.items():
        # A machine without CAP_SYS_RESOURCE cannot raise any: half of what there is, or a large number.
        hard = limits[row][1]
        value = 1 << 40 if hard == "unlimited" else int(hard) // 2
        one.process["rlimits"].append({"type": f"RLIMIT_{name}", "soft": value, "hard": value})
        wanted[row] = [str(value)] * 2
    text = kernel.proc(one.up().pid(), "limits")
    found = {line[:26].strip(): line[26:].split()[:2] for line in text.splitlines()}
    assert {row: found[row] for row in wanted} == wanted


@case()
def an_rlimit_that_is_none(box: Box) -> None:
    one = box.bundle()
    one.process["rlimits"] = [{"type": "RLIMIT_NONSENSE", "soft": 1, "hard": 1}]
    one.create().failed("rlimit")


@case()
def an_rlimit_twice_is_refused(box: Box) -> None:
    one = box.bundle()
    one.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 9}] * 2
    one.create().failed("RLIMIT_NOFILE")


@case()
def oom_score_adj(box: Box) -> None:
    one = box.bundle("cat", "/proc/self/oom_score_adj")
    one.process["oomScoreAdj"] = 321
    assert one.run().ok() == "321\n"


@case()
def without_oom_score_adj_it_is_inherited(box: Box) -> None:
    def set_it() -> None:
        Path("/proc/self/oom_score_adj").write_text("123")

    assert box.bundle("cat", "/proc/self/oom_score_adj").run(preexec_fn=set_it).ok() == "123\n"


@case()
def io_priority(box: Box) -> None:
    one = box.bundle("ionice", "-p", "1")
    one.process["ioPriority"] = {"class": "IOPRIO_CLASS_BE", "priority": 6}
    assert one.run().ok() == "best-effort: prio 6\n"


@case()
def an_io_priority_class_that_is_none(box: Box) -> None:
    one = box.bundle()
    one.process["ioPriority"] = {"class": "IOPRIO_CLASS_NONSENSE", "priority": 6}
    one.create().failed("IOPRIO_CLASS_NONSENSE")


@case()
def scheduler_batch_with_nice(box: Box) -> None:
    one = box.bundle()
    one.process["scheduler"] = {"policy": "SCHED_BATCH", "nice": 5}
    pid = one.up().pid()
    assert os.sched_getscheduler(pid) == os.SCHED_BATCH
    assert os.getpriority(os.PRIO_PROCESS, pid) == 5


@case()
def scheduler_idle(box: Box) -> None:
    one = box.bundle()
    one.process["scheduler"] = {"policy": "SCHED_IDLE"}
    assert os.sched_getscheduler(one.up().pid()) == os.SCHED_IDLE


@case()
def a_scheduler_that_is_none(box: Box) -> None:
    one = box.bundle()
    one.process["scheduler"] = {"policy": "SCHED_NONSENSE"}
    one.create().failed("SCHED_NONSENSE")


@case("two-cpus")
def exec_cpu_affinity(box: Box) -> None:
    cpu = max(os.sched_getaffinity(0))
    one = box.bundle()
    one.process["execCPUAffinity"] = {"initial": str(cpu), "final": str(cpu)}
    one.up()
    said = one.exec("grep", "Cpus_allowed_list", "/proc/self/status").ok()
    assert said.split()[-1] == str(cpu)


@case("two-cpus")
def the_affinity_of_the_caller_does_not_matter(box: Box) -> None:
    """Kubernetes pins its own daemons; their containers must see every processor that their cgroup has."""
    every = os.sched_getaffinity(0)
    one = box.bundle()
    one.resources["cpu"] = {"shares": 512}
    one.create(preexec_fn=lambda: os.sched_setaffinity(0, {min(every)})).ok()
    assert os.sched_getaffinity(one.pid()) == every


@case()
def personality(box: Box) -> None:
    one = box.bundle("uname", "-m")
    one.linux["personality"] = {"domain": "LINUX32"}
    assert one.run().ok() == "i686\n"


# ------------------------------------------------------------------------------------------------------------ sysctl


@case()
def sysctl_of_the_network_namespace(box: Box) -> None:
    one = box.bundle("cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/ping_group_range")
    one.linux["sysctl"] = {"net.ipv4.ip_forward": "1", "net.ipv4.ping_group_range": "5 7"}
    assert one.run().ok().split() == ["1", "5", "7"]


@case()
def sysctl_of_the_ipc_namespace(box: Box) -> None:
    one = box.bundle("cat", "/proc/sys/kernel/msgmax", "/proc/sys/fs/mqueue/msg_max")
    one.linux["sysctl"] = {"kernel.msgmax": "4321", "fs.mqueue.msg_max": "7"}
    assert one.run().ok().split() == ["4321", "7"]


@case()
def a_sysctl_of_the_host_is_refused(box: Box) -> None:
    one = box.bundle()
    one.linux["sysctl"] = {"vm.swappiness": "1"}
    one.create().failed("vm.swappiness")


@case()
def a_sysctl_of_a_shared_namespace_is_refused(box: Box) -> None:
    one = box.bundle().without_namespace("network")
    one.linux["sysctl"] = {"net.ipv4.ip_forward": "1"}
    one.create().failed("net.ipv4.ip_forward")
    two = box.bundle().without_namespace("ipc")
    two.linux["sysctl"] = {"kernel.msgmax": "4321"}
    two.create().failed("kernel.msgmax")


@case()
def a_sysctl_that_is_not_there(box: Box) -> None:
    one = box.bundle()
    one.linux["sysctl"] = {"net.nonsense": "1"}
    one.create().failed("no such file or directory")


@case()
def a_sysctl_with_a_value_that_it_does_not_take(box: Box) -> None:
    one = box.bundle()
    one.linux["sysctl"] = {"net.ipv4.ip_forward": "many"}
    one.create().failed("invalid argument")


@case()
def a_sysctl_with_a_dot_in_an_interface(box: Box) -> None:
    one = box.bundle("cat", "/proc/sys/net/ipv4/conf/lo/forwarding")
    one.linux["sysctl"] = {"net/ipv4/conf/lo/forwarding": "1"}
    assert one.run().ok() == "1\n"
