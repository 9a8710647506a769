"""What a container may use and do: users, capabilities, seccomp, limits, an OOM, devices, sysctls, read-only roots."""

from __future__ import annotations

import json
import re
from pathlib import Path

from conformance.clients.podman.tool import Podman
from conformance.clients.steps import eventually, expect, holds, same, unless

# capabilities(7)
NET_RAW, CHOWN = 1 << 13, 1 << 0
CGROUP_V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()


def status(text: str, key: str) -> str:
    """A field of /proc/PID/status."""
    found = re.search(rf"^{key}:\s*(\S.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def users(it: Podman) -> None:
    same("--user by number", it.shell("id -u; id -g", "--user", "1000:50").split(), ["1000", "50"])
    same("--user by name", it.shell("id -un; id -gn", "--user", "operator").split(), ["operator", "operator"])
    holds("--group-add", it.shell("id -G", "--user", "1000", "--group-add", "33"), "33")
    same("--umask", it.shell("umask", "--umask", "0077"), "0077")
    same("--workdir", it.shell("pwd", "--workdir", "/tmp"), "/tmp")


def environment(it: Podman) -> None:
    file = it.file("variables", "FROM_FILE=1\n")
    text = it.run("--env", "A=b c", "--env-file", file, "--hostname", "box", "IMAGE", "env")
    holds("env", text, "A=b c", "FROM_FILE=1", "HOME=/root", "HOSTNAME=box", "container=podman")
    same("--hostname", it.run("--hostname", "box", "IMAGE", "hostname"), "box")


def capabilities(it: Podman) -> None:
    text = it.run("--cap-drop=all", "IMAGE", "cat", "/proc/self/status")
    for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        same(f"{key} with --cap-drop=all", int(status(text, key), 16), 0)
    text = it.run("--cap-drop=all", "--cap-add", "net_raw", "IMAGE", "cat", "/proc/self/status")
    same("CapEff with --cap-add net_raw", int(status(text, "CapEff"), 16), NET_RAW)
    same("CapBnd with --cap-add net_raw", int(status(text, "CapBnd"), 16), NET_RAW)
    holds("chown without its capability", it.shell("chown 1 /tmp", "--cap-drop", "chown", code=1), "not permitted")
    text = it.run("--privileged", "IMAGE", "cat", "/proc/self/status")
    ours = int(status(Path("/proc/self/status").read_text(), "CapBnd"), 16)
    same("CapEff with --privileged", int(status(text, "CapEff"), 16), ours)
    text = it.run("--user", "1000", "--cap-add", "net_raw", "IMAGE", "cat", "/proc/self/status")
    same("CapAmb of a user with --cap-add", int(status(text, "CapAmb"), 16), NET_RAW)


def no_new_privileges(it: Podman) -> None:
    text = it.run("--security-opt", "no-new-privileges", "IMAGE", "cat", "/proc/self/status")
    same("NoNewPrivs", status(text, "NoNewPrivs"), "1")
    same("NoNewPrivs as it comes", status(it.run("IMAGE", "cat", "/proc/self/status"), "NoNewPrivs"), "0")


def seccomp(it: Podman) -> None:
    same("Seccomp by default", status(it.run("IMAGE", "cat", "/proc/self/status"), "Seccomp"), "2")
    text = it.run("--security-opt", "seccomp=unconfined", "IMAGE", "cat", "/proc/self/status")
    same("Seccomp when unconfined", status(text, "Seccomp"), "0")
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
    }
    file = it.file("no-mkdir.json", json.dumps(profile))
    text = it.shell("mkdir /tmp/x", "--security-opt", f"seccomp={file}", code=1)
    holds("mkdir under a profile that forbids it", text, "not supported")


def read_only(it: Podman) -> None:
    text = it.shell("touch /x; touch /tmp/x && echo tmp is there", "--read-only")
    holds("--read-only", text, "tmp is there")
    same("a root that is read-only", it.shell("touch /x", "--read-only", code=1).count("Read-only file system"), 1)
    text = it.shell("touch /x", "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/scratch", code=1)
    holds("without its tmpfs", text, "Read-only file system")
    options = ("--read-only", "--tmpfs", "/scratch:size=1m,mode=1750,noexec")
    same(
        "--tmpfs",
        it.shell("stat -c %a /scratch; df -k /scratch | awk 'END {print $2}'", *options).split(),
        ["1750", "1024"],
    )
    text = it.shell("dd if=/dev/zero of=/scratch/x bs=1k count=2000", *options, code=1)
    holds("more than its size", text, "No space left on device")


def memory(it: Podman) -> None:
    """The limit, an OOM in a child, and an OOM of the whole: 137, noticed by conmon."""
    it.start("small", "--memory", "20m", "--memory-swap", "20m")
    stats = json.loads(it("stats", "--no-stream", "--format", "json", "small"))[0]
    holds("stats: the limit", stats["mem_usage"], "20.97MB")
    it("exec", "small", "tail", "/dev/zero", code=137)
    same("after an exec's OOM", it.state("small"), "running")
    noticed = it.directory / "oom"
    noticed.unlink(missing_ok=True)
    it(
        "run",
        "--name",
        "eater",
        "--net",
        "none",
        "--memory",
        "20m",
        "--memory-swap",
        "20m",
        it.image,
        "tail",
        "/dev/zero",
        code=137,
    )
    same("exit code by inspect", it.inspect("eater")["State"]["ExitCode"], 137)
    # conmon 2.1.6 writes "oom" into its working directory on cgroup v1, where podman does not look for it.
    expect(it.inspect("eater")["State"]["OOMKilled"] or (not CGROUP_V2 and noticed.exists()), "the OOM was not noticed")


def limits(it: Podman) -> None:
    text = it.shell("for i in 1 2 3 4 5 6; do sleep 1 & done; wait", "--pids-limit", "5", code=2)
    holds("--pids-limit", text, "can't fork")
    it.start("limited", "--cpus", "0.5", "--cpu-shares", "300", "--cpuset-cpus", "0", "--memory-reservation", "10m")
    seen = {name: cgroup_value(it.pid("limited"), *name) for name in CPU_FILES}
    same("the cgroup's files", seen, CPU_FILES)


CPU_FILES = (
    {("cpu.max", ""): "50000 100000", ("cpuset.cpus", ""): "0", ("memory.low", ""): str(10 << 20)}
    if CGROUP_V2
    else {
        ("cpu.cfs_quota_us", "cpu"): "50000",
        ("cpu.shares", "cpu"): "300",
        ("cpuset.cpus", "cpuset"): "0",
        ("memory.soft_limit_in_bytes", "memory"): str(10 << 20),
    }
)


def cgroup_value(pid: int, file: str, controller: str) -> str:
    """A file of the cgroup that `pid` is in; `controller` is "" on cgroup v2."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}/{file}").read_text().strip()
    return "no such cgroup"


def update(it: Podman) -> None:
    it.start("grows", "--memory", "20m")
    file, controller = ("memory.max", "") if CGROUP_V2 else ("memory.limit_in_bytes", "memory")
    same("the limit", cgroup_value(it.pid("grows"), file, controller), str(20 << 20))
    it("update", "--memory", "50m", "--cpus", "0.25", "grows")
    same("the limit after update", cgroup_value(it.pid("grows"), file, controller), str(50 << 20))
    quota = cgroup_value(it.pid("grows"), "cpu.max", "") if CGROUP_V2 else ""
    quota = quota or cgroup_value(it.pid("grows"), "cpu.cfs_quota_us", "cpu")
    same("the quota after update", quota.split()[0], "25000")


def devices(it: Podman) -> None:
    open_for = {"reading": ": < /dev/held", "writing": ": > /dev/held"}
    same("without --device", it.shell("test -e /dev/held; echo $?"), "1")
    same("--device", it.shell("stat -c '%t %T %a' /dev/held", "--device", "/dev/fuse:/dev/held"), "a e5 600")
    for access, refused in (("r", "writing"), ("w", "reading"), ("rw", "")):
        for what, script in open_for.items():
            text = it.shell(script, "--device", f"/dev/fuse:/dev/held:{access}", code=int(what == refused))
            holds(f"{what} with :{access}", text, "not permitted" if what == refused else "")
    make = "mknod /tmp/fuse c 10 229 && : < /tmp/fuse"
    holds("a device that no rule allows", it.shell(make, "--cap-add", "mknod", code=1), "not permitted")
    it.shell(make, "--cap-add", "mknod", "--device-cgroup-rule", "c 10:229 rwm")


@unless("runc", "without CAP_SYS_RESOURCE it cannot set podman's default for nproc, and --ulimit brings that along")
def ulimits(it: Podman) -> None:
    same("--ulimit nofile", it.shell("ulimit -n; ulimit -Hn", "--ulimit", "nofile=100:200").split(), ["100", "200"])


def sysctls(it: Podman) -> None:
    options = ("--sysctl", "net.ipv4.ip_forward=1", "--sysctl", "kernel.msgmax=4096")
    text = it.shell("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax", *options)
    same("--sysctl", text.split(), ["1", "4096"])


def masked_paths(it: Podman) -> None:
    same("/proc/timer_list and /sys/firmware as they come", it.shell("cat /proc/timer_list; ls /sys/firmware"), "")
    expect(it.shell("ls /sys/firmware", "--security-opt", "unmask=/sys/firmware"), "unmask= leaves it masked")
    holds("a write to /proc/sys", it.shell("echo 1 > /proc/sys/kernel/msgmax", code=1), "Read-only file system")
    text = it.shell("cat /proc/uptime", "--security-opt", "mask=/proc/uptime")
    same("mask=", text, "")
    it.shell("echo 4096 > /proc/sys/kernel/msgmax", "--security-opt", "unmask=ALL")


def oom_score(it: Podman) -> None:
    same("--oom-score-adj", it.run("--oom-score-adj", "500", "IMAGE", "cat", "/proc/self/oom_score_adj"), "500")


def keyring_and_shm(it: Podman) -> None:
    same("--shm-size", it.shell("df -k /dev/shm | awk 'END {print $2}'", "--shm-size", "1m"), "1024")
    eventually(lambda: it("ps", "-aq") == "", "nothing is left")


def privileged(it: Podman) -> None:
    text = it.shell(
        "mount -t tmpfs none /mnt 2>&1 || mkdir -p /mnt && mount -t tmpfs none /mnt && echo mounted", "--privileged"
    )
    holds("a mount in a privileged container", text, "mounted")
    holds("a mount in a plain one", it.shell("mount -t tmpfs none /tmp", code=1), "ermission denied")


STEPS = (
    users,
    environment,
    capabilities,
    no_new_privileges,
    seccomp,
    read_only,
    memory,
    limits,
    update,
    devices,
    ulimits,
    sysctls,
    masked_paths,
    oom_score,
    keyring_and_shm,
    privileged,
)
