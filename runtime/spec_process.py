"""The `process` object of config.json, and of an exec, as frozen values (runtime-spec config.md "Process").

Refuses what no kernel takes, by the field's path: ids and limits out of range, a priority without a policy that has
one. Invariant: names are numbers here, and every number is in the range that its system call documents.
"""

from __future__ import annotations

from runtime.capabilities import CAPABILITIES
from runtime.fields import Fields
from runtime.linux.record import Record

# Larger ids are legal for the kernel up to 2^32-2, but the peers stop here and images abuse the rest (threats S32).
MAX_ID = (1 << 31) - 1
MAX_UINT64 = (1 << 64) - 1
# asm-generic/resource.h, by number
RLIMITS = (
    *("CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE"),
    *("MEMLOCK", "AS", "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME"),
)
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
# uapi/linux/sched.h
POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
SCHED_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
_MAX_CPU = 8192  # CONFIG_NR_CPUS of the largest kernels


class User(Record):
    """Who the process is. `umask` None: as runc has it, 0022."""

    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    umask: int | None = None


class Capabilities(Record):
    """Five sets as bit masks (capabilities(7)); `unknown` names were in the config and not in any kernel we know."""

    bounding: int = 0
    effective: int = 0
    inheritable: int = 0
    permitted: int = 0
    ambient: int = 0
    unknown: tuple[str, ...] = ()


class Rlimit(Record):
    """`resource` is the number of RLIMIT_*, `name` its name."""

    name: str
    resource: int
    soft: int
    hard: int


class Scheduler(Record):
    """Arguments of sched_setattr(2), by number; times are nanoseconds."""

    policy: int
    flags: int = 0
    nice: int = 0
    priority: int = 0
    runtime: int = 0
    deadline: int = 0
    period: int = 0


class Affinity(Record):
    """The processors of an exec, before it enters its container's cgroup and after; () leaves it to the kernel."""

    initial: tuple[int, ...] = ()
    final: tuple[int, ...] = ()


class Process(Record):
    """config.json's process, and that of an exec. Strings hold the config's bytes (surrogateescape)."""

    args: tuple[str, ...]
    cwd: str
    env: tuple[str, ...] = ()
    user: User = User()
    terminal: bool = False
    console_size: tuple[int, int] = (0, 0)
    capabilities: Capabilities = Capabilities()  # none, also where there is no such object: as the peers
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    apparmor_profile: str = ""
    selinux_label: str = ""
    oom_score_adj: int | None = None
    io_priority: tuple[int, int] | None = None
    scheduler: Scheduler | None = None
    exec_affinity: Affinity | None = None


def parse_process(obj: object, path: str) -> Process:
    """config.json's process, or that of an exec, given as JSON was read. Raises FieldError."""
    fields = Fields(obj, path)
    args = fields.strs("args")
    if not args or not args[0]:
        raise fields.error("args", "args must not be empty, nor the first of them")
    cwd = fields.str("cwd")
    if not cwd:
        raise fields.error("cwd", "Cwd property must not be empty")
    if not cwd.startswith("/"):
        raise fields.error("cwd", f'Cwd must be an absolute path, got "{cwd:.80}"')
    env = fields.strs("env")
    for index, entry in enumerate(env):
        if "=" not in entry[1:]:
            raise fields.error(f"env[{index}]", f'invalid environment variable: expected NAME=VALUE, got "{entry:.80}"')
    console = fields.object("consoleSize")
    return Process(
        args=args,
        cwd=cwd,
        env=env,
        user=_user(fields.object("user") or Fields({}, fields.at("user"))),
        terminal=fields.bool("terminal"),
        console_size=(console.int("height", 0, 65535), console.int("width", 0, 65535)) if console else (0, 0),
        capabilities=_capabilities(fields.object("capabilities")),
        rlimits=_rlimits(fields),
        no_new_privileges=fields.bool("noNewPrivileges"),
        apparmor_profile=fields.str("apparmorProfile"),
        selinux_label=fields.str("selinuxLabel"),
        oom_score_adj=fields.optional_int("oomScoreAdj", -1000, 1000),
        io_priority=_io_priority(fields.object("ioPriority")),
        scheduler=_scheduler(fields.object("scheduler")),
        exec_affinity=_exec_affinity(fields.object("execCPUAffinity")),
    )


def _user(fields: Fields) -> User:
    return User(
        uid=fields.int("uid", 0, MAX_ID),
        gid=fields.int("gid", 0, MAX_ID),
        additional_gids=fields.ints("additionalGids", 0, MAX_ID),
        umask=fields.optional_int("umask", 0, 0o777),
    )


def _capabilities(fields: Fields | None) -> Capabilities:
    if fields is None:
        return Capabilities()
    sets: dict[str, int] = {}
    masks: dict[tuple[str, ...], int] = {}  # three of the five are one list, as a rule
    unknown: list[str] = []
    for kind in ("bounding", "effective", "inheritable", "permitted", "ambient"):
        names = fields.strs(kind)
        if names not in masks:
            masks[names] = sum({1 << CAPABILITIES[name] for name in names if name in CAPABILITIES})
            unknown += [name for name in names if name not in CAPABILITIES and name not in unknown]
        sets[kind] = masks[names]
    return Capabilities(**sets, unknown=tuple(unknown))


def _rlimits(fields: Fields) -> tuple[Rlimit, ...]:
    found: dict[str, Rlimit] = {}
    for entry in fields.objects("rlimits"):
        name = entry.str("type", required=True)
        short = name.removeprefix("RLIMIT_")
        if short not in RLIMITS or short == name:
            raise entry.error("type", f'unknown resource limit "{name:.40}"')
        if name in found:
            raise entry.error("type", f"{name} is given twice")
        soft, hard = (entry.int(key, 0, MAX_UINT64, required=True) for key in ("soft", "hard"))
        if soft > hard:
            raise entry.error("soft", f"{soft} is above the hard limit {hard}")
        found[name] = Rlimit(name, RLIMITS.index(short), soft, hard)
    return tuple(found.values())


def _io_priority(fields: Fields | None) -> tuple[int, int] | None:
    if fields is None:
        return None
    name = fields.str("class", required=True, choices=IO_CLASSES)
    return IO_CLASSES[name], fields.int("priority", 0, 7)


def _scheduler(fields: Fields | None) -> Scheduler | None:
    if fields is None:
        return None
    policy = fields.str("policy", required=True, choices=POLICIES)
    flags = 0
    for name in fields.strs("flags", choices=SCHED_FLAGS):
        flags |= SCHED_FLAGS[name]
    found = Scheduler(
        policy=POLICIES[policy],
        flags=flags,
        nice=fields.int("nice", -20, 19),
        priority=fields.int("priority", 0, 99),
        **{key: fields.int(key, 0, MAX_UINT64) for key in ("runtime", "deadline", "period")},
    )
    if found.priority and policy not in ("SCHED_FIFO", "SCHED_RR"):
        raise fields.error("priority", f"can only be given with SCHED_FIFO or SCHED_RR, not with {policy}")
    for key in ("runtime", "deadline", "period"):
        if getattr(found, key) and policy != "SCHED_DEADLINE":
            raise fields.error(key, f"can only be given with SCHED_DEADLINE, not with {policy}")
    return found


def _exec_affinity(fields: Fields | None) -> Affinity | None:
    if fields is None:
        return None
    return Affinity(*(_cpus(fields, key) for key in ("initial", "final")))


def _cpus(fields: Fields, key: str) -> tuple[int, ...]:
    """A list of processors as cpuset(7) has it: "0-3,7"."""
    text = fields.str(key)
    found: set[int] = set()
    for part in text.split(",") if text else ():
        low, dash, high = part.strip().partition("-")
        numbers = (low, high) if dash else (low, low)
        if not all(number.isascii() and number.isdecimal() and len(number) < 6 for number in numbers):
            raise fields.error(key, f'expected processors like 0-3,7, got "{text:.80}"')
        first, last = map(int, numbers)
        if first > last or last >= _MAX_CPU:
            raise fields.error(key, f'"{part:.20}" is no range of processors')
        found.update(range(first, last + 1))
    return tuple(sorted(found))
