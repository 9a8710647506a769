"""What a container uses, in the words and with the units of runc's `events`: every figure that its cgroups keep.

runtime.cgroups.stats is the quick look of a node at all of its containers; this is the long one at one of them. Refuses
nothing: a file that is not there leaves its figure out, or at 0 where runc always prints one. Invariant: figures that
runc leaves out when they are zero are left out here too.
"""

from __future__ import annotations

import os

from runtime.cgroups.stats import pressure, read, table

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from runtime.cgroups.stats import Stall

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_NO_LIMIT = (1 << 64) - 1  # math.MaxUint64, which is what runc makes of v2's "max"
# The cpuset files whose values are printed, in runc's order; those of v1 alone, which v2 has as 0.
_CPUSET_FLAGS = (
    *("cpu_exclusive", "mem_hardwall", "mem_exclusive", "memory_migrate", "memory_spread_page", "memory_spread_slab"),
    *("memory_pressure", "sched_load_balance", "sched_relax_domain_level"),
)
_BLKIO = (
    ("ioServiceBytesRecursive", "io_service_bytes_recursive"),
    ("ioServicedRecursive", "io_serviced_recursive"),
    ("ioQueueRecursive", "io_queued_recursive"),
    ("ioServiceTimeRecursive", "io_service_time_recursive"),
    ("ioWaitTimeRecursive", "io_wait_time_recursive"),
    ("ioMergedRecursive", "io_merged_recursive"),
    ("ioTimeRecursive", "time_recursive"),
    ("sectorsRecursive", "sectors_recursive"),
)


def figures(paths: Mapping[str, str], intel_rdt: dict[str, object] | None = None) -> dict[str, object]:
    """The `data` of a stats event, from the directories by controller that Manager.paths() names; what resctrl knows
    comes from runtime.intel_rdt."""
    v2 = paths.get("", "") if "memory" not in paths else ""
    return {
        "cpu": _cpu_v2(v2) if v2 else _cpu_v1(paths),
        "cpuset": _cpuset(v2 or paths.get("cpuset", ""), "effective" if v2 else ""),
        "memory": _memory_v2(v2) if v2 else _memory_v1(paths.get("memory", "")),
        "pids": _pids(v2 or paths.get("pids", "")),
        "blkio": _blkio_v2(v2) if v2 else _blkio_v1(paths.get("blkio", "")),
        "hugetlb": _hugetlb(paths.get("hugetlb") or paths.get("", "")),
        "intel_rdt": intel_rdt or {},
        "network_interfaces": None,
    }


def _number(path: str) -> int:
    """A file of one number; 0 when it is not there, _NO_LIMIT for "max"."""
    raw = read(path).strip()
    return _NO_LIMIT if raw == b"max" else int(raw) if raw.lstrip(b"-").isdigit() else 0


def _some(**values: object) -> dict[str, object]:
    """Those that are not zero, empty or None: what runc marks as omitempty."""
    return {key: value for key, value in values.items() if value}


def _text(values: Mapping[bytes, int]) -> dict[str, int]:
    return {key.decode("ascii", "replace"): values[key] for key in sorted(values)}


# ------------------------------------------------------------------------------------------------------------- cpu


def _cpu_v1(paths: Mapping[str, str]) -> dict[str, object]:
    usage, bandwidth = paths.get("cpuacct", ""), table(read(f"{paths.get('cpu', '')}/cpu.stat"))
    ticks = table(read(f"{usage}/cpuacct.stat"))
    rows = [line.split() for line in read(f"{usage}/cpuacct.usage_all").splitlines()[1:]]
    return {
        "usage": {
            **_some(
                total=_number(f"{usage}/cpuacct.usage"),
                percpu=[int(word) for word in read(f"{usage}/cpuacct.usage_percpu").split()],
                # "cpu user system", a line each.
                percpu_kernel=[int(row[2]) for row in rows if len(row) == 3],
                percpu_user=[int(row[1]) for row in rows if len(row) == 3],
            ),
            "kernel": ticks.get(b"system", 0) * _TICK_NS,
            "user": ticks.get(b"user", 0) * _TICK_NS,
        },
        "throttling": _some(
            periods=bandwidth.get(b"nr_periods", 0),
            throttledPeriods=bandwidth.get(b"nr_throttled", 0),
            throttledTime=bandwidth.get(b"throttled_time", 0),
        ),
    }


def _cpu_v2(path: str) -> dict[str, object]:
    found = table(read(f"{path}/cpu.stat"))
    return {
        "usage": {
            **_some(total=found.get(b"usage_usec", 0) * 1000),
            "kernel": found.get(b"system_usec", 0) * 1000,
            "user": found.get(b"user_usec", 0) * 1000,
        },
        "throttling": _some(
            periods=found.get(b"nr_periods", 0),
            throttledPeriods=found.get(b"nr_throttled", 0),
            throttledTime=found.get(b"throttled_usec", 0) * 1000,
        ),
        **_some(psi=_pressure(f"{path}/cpu.pressure")),
    }


def _cpuset(path: str, which: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, names in (("cpus", ("cpus", "effective_cpus")), ("mems", ("mems", "effective_mems"))):
        files = [f"cpuset.{key}.effective"] if which else [f"cpuset.{name}" for name in names]
        numbers = next((listed for file in files if (listed := _numbers(read(f"{path}/{file}")))), [])
        found.update(_some(**{key: numbers}))
        flags = _CPUSET_FLAGS[:1] if key == "cpus" else _CPUSET_FLAGS[1:]
        found.update({name: _number(f"{path}/cpuset.{name}") for name in flags})
    return found


def _numbers(raw: bytes) -> list[int]:
    """ "0-3,7" as numbers."""
    found: list[int] = []
    for part in raw.decode("ascii", "replace").strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit() and int(last or first) < 65536:
            found += range(int(first), int(last or first) + 1)
    return found


def _pressure(path: str) -> dict[str, object]:
    """Pressure stall information (accounting/psi.rst): "some avg10=0.00 avg60=0.00 avg300=0.00 total=0"."""
    found = pressure(path)
    if found is None:
        return {}
    return {kind: _stall(stall) for kind, stall in (("some", found.some), ("full", found.full)) if stall is not None}


def _stall(stall: Stall) -> dict[str, object]:
    return {"avg10": stall.avg10, "avg60": stall.avg60, "avg300": stall.avg300, "total": stall.total_us}


# ---------------------------------------------------------------------------------------------------------- memory


def _memory_v1(path: str) -> dict[str, object]:
    def entry(name: str) -> dict[str, object]:
        dot = f"{path}/memory.{name}"
        return {
            "limit": _number(f"{dot}limit_in_bytes"),
            **_some(usage=_number(f"{dot}usage_in_bytes"), max=_number(f"{dot}max_usage_in_bytes")),
            "failcnt": _number(f"{dot}failcnt"),
        }

    raw = table(read(f"{path}/memory.stat"))
    return {
        **_some(cache=raw.get(b"cache", 0)),
        "usage": entry(""),
        "swap": entry("memsw."),
        "kernel": entry("kmem."),
        "kernelTCP": entry("kmem.tcp."),
        "raw": _text(raw),
    }


def _memory_v2(path: str) -> dict[str, object]:
    raw, events = table(read(f"{path}/memory.stat")), table(read(f"{path}/memory.events"))
    usage, limit = _number(f"{path}/memory.current"), _number(f"{path}/memory.max")
    swap = _number(f"{path}/memory.swap.max")
    # v1 counts memory and swap together, and so does who reads this.
    both = _NO_LIMIT if _NO_LIMIT in (swap, limit) else swap + limit
    none: dict[str, object] = {"limit": 0, "failcnt": 0}
    return {
        **_some(cache=raw.get(b"file", 0)),
        "usage": {"limit": limit, **_some(usage=usage, max=_number(f"{path}/memory.peak")), "failcnt": 0},
        "swap": {"limit": both, **_some(usage=usage + _number(f"{path}/memory.swap.current")), "failcnt": 0},
        "kernel": none,
        "kernelTCP": none,
        "raw": _text(raw),
        **_some(psi=_pressure(f"{path}/memory.pressure")),
        "event_count": _some(**_text(events)),
    }


# ------------------------------------------------------------------------------------------------------- the others


def _pids(path: str) -> dict[str, object]:
    limit = _number(f"{path}/pids.max")
    return _some(current=_number(f"{path}/pids.current"), limit=0 if limit == _NO_LIMIT else limit)


def _blkio_v1(path: str) -> dict[str, object]:
    """CFQ's figures, BFQ's, or those of the throttle layer, which every kernel has."""
    for kind in ("blkio.", "blkio.bfq.", "blkio.throttle."):
        found = {}
        for key, file in _BLKIO:
            found[key] = list(_lines_v1(read(f"{path}/{kind}{file}")))
        if found["ioServicedRecursive"]:
            return _some(**found)
    return {}


def _lines_v1(raw: bytes) -> Iterable[dict[str, object]]:
    """ "8:0 Read 4096", and sums as "8:0 4096"; the last line, "Total 4096", is of no device."""
    for line in raw.decode("ascii", "replace").splitlines():
        device, *words = line.split()
        major, colon, minor = device.partition(":")
        if colon and words and words[-1].isdigit():
            yield _some(major=int(major), minor=int(minor), op="".join(words[:-1]), value=int(words[-1]))


def _blkio_v2(path: str) -> dict[str, object]:
    names = {"rbytes": ("Read", 0), "wbytes": ("Write", 0), "rios": ("Read", 1), "wios": ("Write", 1)}
    tables: tuple[list[object], list[object]] = ([], [])
    for line in read(f"{path}/io.stat").decode("ascii", "replace").splitlines():
        device, *pairs = line.split()
        major, _, minor = device.partition(":")
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key in names and value.isdigit():
                op, which = names[key]
                tables[which].append(_some(major=int(major), minor=int(minor), op=op, value=int(value)))
    found = _some(ioServiceBytesRecursive=tables[0], ioServicedRecursive=tables[1])
    return {**found, **_some(psi=_pressure(f"{path}/io.pressure"))}


def _hugetlb(path: str) -> dict[str, object]:
    """By page size, of v1 or v2; {} where the controller is not on."""
    found: dict[str, object] = {}
    try:
        names = sorted(os.listdir(path)) if path else []
    except OSError:
        return found
    for name in names:
        controller, _, rest = name.partition(".")
        size, _, what = rest.partition(".")
        if controller != "hugetlb" or what not in ("usage_in_bytes", "current"):
            continue
        base = f"{path}/hugetlb.{size}"
        if what == "current":
            failures = table(read(f"{base}.events")).get(b"max", 0)
            found[size] = {**_some(usage=_number(f"{base}.current")), "failcnt": failures}
        else:
            peak = _number(f"{base}.max_usage_in_bytes")
            usage = _some(usage=_number(f"{base}.usage_in_bytes"), max=peak)
            found[size] = {**usage, "failcnt": _number(f"{base}.failcnt")}
    return found
