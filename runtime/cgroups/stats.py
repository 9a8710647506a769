"""What a container uses, read from its cgroups by path: a dozen small files, in well under 0.2 ms.

Refuses nothing: a file that a kernel lacks, or a container that ends meanwhile, reads as zero, so that one container
never spoils the list of all (threats O42). Invariant: numbers are nanoseconds and bytes, and -1 is "no limit".
"""

from __future__ import annotations

import os
import time

from runtime.linux.record import Record

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_V1_UNLIMITED = 1 << 62  # v1 prints the largest multiple of a page below 2^63 for "no limit"


class DeviceIo(Record):
    """Bytes and operations of one block device, since the cgroup was made. How long they took, how many were merged and
    how many are under way, I/O schedulers alone count, and on v2 none does; None where it is not known."""

    major: int
    minor: int
    read_bytes: int = 0
    write_bytes: int = 0
    reads: int = 0
    writes: int = 0
    reads_merged: int | None = None
    writes_merged: int | None = None
    read_ns: int | None = None
    write_ns: int | None = None
    queued: int | None = None


class HugePages(Record):
    """Bytes of huge pages of one size, such as "2MB"; v2 keeps no `peak`."""

    size: str
    usage: int
    peak: int | None = None


class Stall(Record):
    """Part of the time (percent, over 10, 60 and 300 s) and time in all in which somebody waited."""

    total_us: int = 0
    avg10: float = 0.0
    avg60: float = 0.0
    avg300: float = 0.0


class Pressure(Record):
    """Pressure stall information (accounting/psi.rst): `some` process had to wait, or all did (`full`, which kernels
    before 5.13 do not tell of the processor)."""

    some: Stall | None = None
    full: Stall | None = None


class Stats(Record):
    """One look at a container. Memory counts those below it, as the kernel's `total_` figures do."""

    timestamp_ns: int
    cpu_usage_ns: int = 0
    cpu_user_ns: int = 0
    cpu_system_ns: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled_ns: int = 0
    memory_usage: int = 0
    memory_peak: int = 0
    memory_limit: int = -1
    memory_rss: int = 0
    memory_cache: int = 0
    memory_inactive_file: int = 0
    memory_active_file: int = 0
    memory_kernel: int = 0
    memory_limit_hits: int = 0
    memory_reservation: int = -1
    memory_mapped_file: int = 0
    page_faults: int = 0
    major_page_faults: int = 0
    swap_usage: int = 0
    swap_limit: int = -1
    oom_kills: int = 0
    pids: int = 0
    pids_limit: int = -1
    io: tuple[DeviceIo, ...] = ()
    huge_pages: tuple[HugePages, ...] = ()
    cpu_pressure: Pressure | None = None
    memory_pressure: Pressure | None = None
    io_pressure: Pressure | None = None

    @property
    def memory_working_set(self) -> int:
        """What the kubelet evicts by: usage without the page cache that can go at once."""
        return max(0, self.memory_usage - self.memory_inactive_file)

    @property
    def memory_available(self) -> int:
        """Limit minus working set; -1 without a limit."""
        return -1 if self.memory_limit < 0 else max(0, self.memory_limit - self.memory_working_set)


def read(path: str) -> bytes:
    """A cgroup file; b"" when there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return b""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
    finally:
        os.close(fd)


def number(raw: bytes, default: int = 0) -> int:
    """A file of one number; "max", and what v1 prints for it, is -1."""
    raw = raw.strip()
    if raw == b"max":
        return -1
    if not raw.isdigit():
        return default
    value = int(raw)
    return -1 if value >= _V1_UNLIMITED else value


def table(raw: bytes) -> dict[bytes, int]:
    """A file of "name value" lines."""
    words = raw.split()
    try:
        return dict(zip(words[::2], map(int, words[1::2]), strict=False))
    except ValueError:
        return {}


def _line(raw: bytes, start: bytes) -> int:
    """The number of the line that begins so, 0 without: for a file of which few lines are wanted, quicker than
    `table`."""
    begin = raw.find(start)
    if begin < 0:
        return 0
    begin += len(start)
    end = raw.find(b"\n", begin)
    digits = raw[begin:end] if end >= 0 else raw[begin:]
    return int(digits) if digits.isdigit() else 0


def of_v1(directories: dict[str, str], full: bool = True) -> dict[str, object]:
    """The fields of Stats that v1 hierarchies hold, from {controller: directory}."""
    found: dict[str, object] = {}
    if path := directories.get("cpuacct"):
        found["cpu_usage_ns"] = number(read(f"{path}/cpuacct.usage"))
    if path := directories.get("memory"):
        found.update(_memory_v1(path))
    if full:
        found.update(_more_v1(directories))
    return found


def _more_v1(directories: dict[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    if path := directories.get("cpuacct"):
        times = table(read(f"{path}/cpuacct.stat"))
        found["cpu_user_ns"] = times.get(b"user", 0) * _TICK_NS
        found["cpu_system_ns"] = times.get(b"system", 0) * _TICK_NS
    if path := directories.get("cpu"):
        cpu = table(read(f"{path}/cpu.stat"))
        found.update(
            periods=cpu.get(b"nr_periods", 0),
            throttled_periods=cpu.get(b"nr_throttled", 0),
            throttled_ns=cpu.get(b"throttled_time", 0),
        )
    if path := directories.get("memory"):
        found["memory_peak"] = number(read(f"{path}/memory.max_usage_in_bytes"))
        found["memory_kernel"] = number(read(f"{path}/memory.kmem.usage_in_bytes"))
        found["memory_limit_hits"] = number(read(f"{path}/memory.failcnt"))
        found["memory_reservation"] = number(read(f"{path}/memory.soft_limit_in_bytes"), -1)
        found["oom_kills"] = oom_kills_v1(path)
    if path := directories.get("pids"):
        found["pids"] = number(read(f"{path}/pids.current"))
        found["pids_limit"] = number(read(f"{path}/pids.max"), -1)
    if path := directories.get("blkio"):
        found.update(io=_io_v1(path))
    return found


def _memory_v1(path: str) -> dict[str, object]:
    raw = b"\n" + read(f"{path}/memory.stat")
    usage = number(read(f"{path}/memory.usage_in_bytes"))
    limit = number(read(f"{path}/memory.limit_in_bytes"), -1)
    both = number(read(f"{path}/memory.memsw.limit_in_bytes"), -1)
    return {
        "memory_usage": usage,
        "memory_limit": limit,
        "memory_rss": _line(raw, b"\ntotal_rss "),
        "memory_cache": _line(raw, b"\ntotal_cache "),
        "memory_inactive_file": _line(raw, b"\ntotal_inactive_file "),
        "memory_active_file": _line(raw, b"\ntotal_active_file "),
        "memory_mapped_file": _line(raw, b"\ntotal_mapped_file "),
        "page_faults": _line(raw, b"\ntotal_pgfault "),
        "major_page_faults": _line(raw, b"\ntotal_pgmajfault "),
        "swap_usage": _line(raw, b"\ntotal_swap "),
        "swap_limit": both - limit if both >= 0 and limit >= 0 else -1,
    }


def oom_kills_v1(path: str) -> int:
    """memory.oom_control's oom_kill (4.13), which v1 counts for each cgroup alone: so those below are added."""
    total = table(read(f"{path}/memory.oom_control")).get(b"oom_kill", 0)
    try:
        if os.stat(path).st_nlink > 2:
            with os.scandir(path) as entries:
                below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            total += sum(oom_kills_v1(child) for child in below)
    except (OSError, RecursionError):
        pass  # it is being removed, or nests deeper than anybody counts
    return total


def oom_kills_v2(path: str) -> int:
    """memory.events' oom_kill, which counts those below as well."""
    return table(read(f"{path}/memory.events")).get(b"oom_kill", 0)


def _io_v1(path: str) -> tuple[DeviceIo, ...]:
    devices: dict[bytes, dict[bytes, int]] = {}

    def add(file: str, names: dict[bytes, bytes]) -> bool:
        raw = read(f"{path}/{file}")
        for line in raw.splitlines():
            words = line.split()
            if len(words) == 3 and words[1] in names:
                devices.setdefault(words[0], {})[names[words[1]]] = int(words[2])
        return bool(raw)

    add("blkio.throttle.io_service_bytes_recursive", {b"Read": b"read_bytes", b"Write": b"write_bytes"})
    add("blkio.throttle.io_serviced_recursive", {b"Read": b"reads", b"Write": b"writes"})
    # BFQ's where the kernel is built to keep them (CONFIG_BFQ_CGROUP_DEBUG), CFQ's before 5.0.
    for kind in ("blkio.bfq.", "blkio."):
        if add(f"{kind}io_merged_recursive", {b"Read": b"reads_merged", b"Write": b"writes_merged"}):
            add(f"{kind}io_service_time_recursive", {b"Read": b"read_ns", b"Write": b"write_ns"})
            add(f"{kind}io_queued_recursive", {b"Total": b"queued"})
            break
    return tuple(_device(device, values) for device, values in devices.items())


def _device(name: bytes, values: dict[bytes, int]) -> DeviceIo:
    major, _, minor = name.partition(b":")
    return DeviceIo(
        int(major),
        int(minor),
        values.get(b"read_bytes", 0),
        values.get(b"write_bytes", 0),
        values.get(b"reads", 0),
        values.get(b"writes", 0),
        values.get(b"reads_merged"),
        values.get(b"writes_merged"),
        values.get(b"read_ns"),
        values.get(b"write_ns"),
        values.get(b"queued"),
    )


def of_v2(path: str, full: bool = True) -> dict[str, object]:
    """The fields of Stats that a v2 cgroup holds; only those of controllers that are on here."""
    found: dict[str, object] = {}
    cpu = table(read(f"{path}/cpu.stat"))
    if b"usage_usec" in cpu:
        found.update(
            cpu_usage_ns=cpu[b"usage_usec"] * 1000,
            cpu_user_ns=cpu.get(b"user_usec", 0) * 1000,
            cpu_system_ns=cpu.get(b"system_usec", 0) * 1000,
            periods=cpu.get(b"nr_periods", 0),
            throttled_periods=cpu.get(b"nr_throttled", 0),
            throttled_ns=cpu.get(b"throttled_usec", 0) * 1000,
        )
    if memory := read(f"{path}/memory.stat"):
        memory = b"\n" + memory
        found.update(
            memory_usage=number(read(f"{path}/memory.current")),
            memory_limit=number(read(f"{path}/memory.max"), -1),
            memory_rss=_line(memory, b"\nanon "),
            memory_cache=_line(memory, b"\nfile "),
            memory_inactive_file=_line(memory, b"\ninactive_file "),
            memory_active_file=_line(memory, b"\nactive_file "),
            memory_mapped_file=_line(memory, b"\nfile_mapped "),
            page_faults=_line(memory, b"\npgfault "),
            major_page_faults=_line(memory, b"\npgmajfault "),
            swap_usage=number(read(f"{path}/memory.swap.current")),
            swap_limit=number(read(f"{path}/memory.swap.max"), -1),
        )
        if full:
            events = table(read(f"{path}/memory.events"))
            found.update(
                memory_peak=number(read(f"{path}/memory.peak")),
                memory_kernel=_line(memory, b"\nkernel "),
                memory_limit_hits=events.get(b"max", 0),
                memory_reservation=number(read(f"{path}/memory.low"), -1),
                oom_kills=events.get(b"oom_kill", 0),
            )
    if full and (raw := read(f"{path}/pids.current")):
        found["pids"] = number(raw)
        found["pids_limit"] = number(read(f"{path}/pids.max"), -1)
    if full and (raw := read(f"{path}/io.stat")):
        found["io"] = _io_v2(raw)
    return found


def _io_v2(raw: bytes) -> tuple[DeviceIo, ...]:
    names = {b"rbytes": b"read_bytes", b"wbytes": b"write_bytes", b"rios": b"reads", b"wios": b"writes"}
    devices = []
    for line in raw.splitlines():
        device, *pairs = line.split()
        values = {}
        for pair in pairs:
            key, _, value = pair.partition(b"=")
            if key in names and value.isdigit():
                values[names[key]] = int(value)
        devices.append(_device(device, values))
    return tuple(devices)


def page_sizes() -> tuple[str, ...]:
    """The sizes of huge pages that this kernel has, as cgroup files spell them (hugetlbpage.rst)."""
    try:
        found = [int(name[len("hugepages-") : -len("kB")]) for name in os.listdir("/sys/kernel/mm/hugepages")]
    except (OSError, ValueError):
        return ()
    return tuple(f"{size >> 20}GB" if size >= 1 << 20 else f"{size >> 10}MB" for size in sorted(found) if size >> 10)


def huge_pages(path: str) -> tuple[HugePages, ...]:
    """Of a cgroup directory of the hugetlb controller, v1 or v2."""
    found = []
    for size in page_sizes():
        base = f"{path}/hugetlb.{size}"
        if raw := read(f"{base}.current"):
            found.append(HugePages(size, number(raw)))
        elif raw := read(f"{base}.usage_in_bytes"):
            found.append(HugePages(size, number(raw), number(read(f"{base}.max_usage_in_bytes"))))
    return tuple(found)


def pressure(path: str) -> Pressure | None:
    """A file such as cpu.pressure; None where the kernel keeps none."""
    found: dict[bytes, Stall] = {}
    for line in read(path).splitlines():
        # some avg10=0.00 avg60=0.00 avg300=0.00 total=0
        words = line.replace(b"=", b" ").split()
        try:
            found[words[0]] = Stall(int(words[8]), float(words[2]), float(words[4]), float(words[6]))
        except (ValueError, IndexError):
            return None
    return Pressure(found.get(b"some"), found.get(b"full")) if found else None


def collect(directories: dict[str, str], v2: str, stalls: str = "", full: bool = True) -> Stats:
    """Stats of a container from its v1 directories by controller, its v2 one, and the v2 one that knows its pressure,
    which is there where v1 has the controllers, too ("" without). Not `full`: without block devices, OOM kills, peaks,
    memory of the kernel, numbers of processes, and v1's throttling and kinds of CPU time: a third less to read."""
    now = time.time_ns()
    values = of_v2(v2, full) if v2 else {}
    if stalls:
        values.update({f"{name}_pressure": pressure(f"{stalls}/{name}.pressure") for name in ("cpu", "memory", "io")})
    values.update(of_v1(directories, full))
    if full and (path := directories.get("hugetlb") or v2):
        values["huge_pages"] = huge_pages(path)
    return Stats(now, **values)  # type: ignore[arg-type]
