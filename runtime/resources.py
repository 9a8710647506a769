"""`linux.resources` of runtime-spec as values: parsed once, merged for an update, understood by runtime.cgroups.

Refuses by path what no cgroup takes, and every name that could leave the cgroup's directory (threats S19). Invariant:
None is "not given", and a 0 that the ecosystem writes for "not given" (limits, shares, quotas, weights) reads as None.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeVar

from runtime.fields import Fields

_CPU_LIST = re.compile(r"[0-9]+(?:-[0-9]+(?::[0-9]+/[0-9]+)?)?(?:,[0-9]+(?:-[0-9]+(?::[0-9]+/[0-9]+)?)?)*", re.ASCII)
_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,8}(?:KB|MB|GB)", re.ASCII)
_UNIFIED_KEY = re.compile(r"[a-z][a-z_]*(?:\.[A-Za-z0-9_]+)+", re.ASCII)
_UINT32, _INT64, _UINT64 = (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1
_MAX_RULES = 4096  # devices, throttles, unified keys: far above any real container, far below trouble

T = TypeVar("T", bound=tuple[object, ...])


class Memory(NamedTuple):
    """Bytes; -1 is unlimited. `swap` is memory and swap together, as in cgroup v1 and the spec."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None
    kernel_tcp: int | None = None
    swappiness: int | None = None
    disable_oom_killer: bool | None = None
    check_before_update: bool | None = None


class Cpu(NamedTuple):
    """Microseconds, but for `shares`; a `quota` of -1 is unlimited."""

    shares: int | None = None
    quota: int | None = None
    period: int | None = None
    burst: int | None = None
    realtime_runtime: int | None = None
    realtime_period: int | None = None
    idle: int | None = None


class Cpuset(NamedTuple):
    """Lists such as "0-3,7"."""

    cpus: str | None = None
    mems: str | None = None


class Pids(NamedTuple):
    """-1 is unlimited."""

    limit: int | None = None


class DeviceValue(NamedTuple):
    """A weight or a rate of one block device."""

    major: int
    minor: int
    value: int


class Blkio(NamedTuple):
    """Weights are 10..1000; rates are bytes or operations a second, 0 lifts one."""

    weight: int | None = None
    leaf_weight: int | None = None
    weight_devices: tuple[DeviceValue, ...] = ()
    leaf_weight_devices: tuple[DeviceValue, ...] = ()
    read_bps: tuple[DeviceValue, ...] = ()
    write_bps: tuple[DeviceValue, ...] = ()
    read_iops: tuple[DeviceValue, ...] = ()
    write_iops: tuple[DeviceValue, ...] = ()


class HugePages(NamedTuple):
    page_size: str
    limit: int


class DeviceRule(NamedTuple):
    """`type` is a (all), b or c; a number of -1 is a wildcard; `access` is a subset of "rwm"."""

    allow: bool
    type: str
    major: int
    minor: int
    access: str


class Resources(NamedTuple):
    """All of it. `devices` None: the rules are not to be touched; (): deny all but the default devices."""

    memory: Memory = Memory()
    cpu: Cpu = Cpu()
    cpuset: Cpuset = Cpuset()
    pids: Pids = Pids()
    blkio: Blkio = Blkio()
    hugetlb: tuple[HugePages, ...] = ()
    devices: tuple[DeviceRule, ...] | None = None
    unified: tuple[tuple[str, str], ...] = ()


def parse(fields: Fields) -> Resources:
    """The object `linux.resources`. Raises FieldError naming what is wrong by its path."""
    fields.refuse("network", "rdma", why="is not supported: ocid limits no network class and no RDMA device")
    cpu = fields.object("cpu")
    return Resources(
        memory=_memory(fields.object("memory")),
        cpu=_cpu(cpu),
        cpuset=Cpuset(_cpu_list(cpu, "cpus"), _cpu_list(cpu, "mems")) if cpu else Cpuset(),
        pids=_pids(fields.object("pids")),
        blkio=_blkio(fields.object("blockIO")),
        hugetlb=tuple(_hugepages(item) for item in _bounded(fields, "hugepageLimits")),
        devices=tuple(_device(item) for item in _bounded(fields, "devices")) if fields.has("devices") else None,
        unified=_unified(fields),
    )


def merge(base: Resources, over: Resources) -> Resources:
    """`base` with everything that `over` gives: single values one by one, device values, huge pages and unified keys
    by their key, device rules as a whole."""
    return Resources(
        memory=_merge_flat(base.memory, over.memory),
        cpu=_merge_flat(base.cpu, over.cpu),
        cpuset=_merge_flat(base.cpuset, over.cpuset),
        pids=_merge_flat(base.pids, over.pids),
        blkio=_merge_blkio(base.blkio, over.blkio),
        hugetlb=_merge_keyed(base.hugetlb, over.hugetlb, 1),
        devices=base.devices if over.devices is None else over.devices,
        unified=_merge_keyed(base.unified, over.unified, 1),
    )


def _merge_flat(base: T, over: T) -> T:
    values: list[Any] = [old if new is None else new for old, new in zip(base, over, strict=True)]
    return type(base)(*values)  # a NamedTuple, which has no name as a bound


def _merge_blkio(base: Blkio, over: Blkio) -> Blkio:
    return Blkio(
        base.weight if over.weight is None else over.weight,
        base.leaf_weight if over.leaf_weight is None else over.leaf_weight,
        _merge_keyed(base.weight_devices, over.weight_devices, 2),
        _merge_keyed(base.leaf_weight_devices, over.leaf_weight_devices, 2),
        _merge_keyed(base.read_bps, over.read_bps, 2),
        _merge_keyed(base.write_bps, over.write_bps, 2),
        _merge_keyed(base.read_iops, over.read_iops, 2),
        _merge_keyed(base.write_iops, over.write_iops, 2),
    )


def _merge_keyed(base: tuple[T, ...], over: tuple[T, ...], width: int) -> tuple[T, ...]:
    """The last value of every key, where the first `width` members of an item are its key."""
    return tuple({item[:width]: item for item in (*base, *over)}.values())


def _bounded(fields: Fields, key: str) -> tuple[Fields, ...]:
    items = fields.objects(key)
    if len(items) > _MAX_RULES:
        raise fields.error(key, f"{len(items)} entries, at most {_MAX_RULES} are taken")
    return items


def _memory(fields: Fields | None) -> Memory:
    if fields is None:
        return Memory()
    # "kernel" is read by nobody any more: the kernel dropped it in 5.16, and runc ignores it.
    fields.optional_int("kernel", -1)
    return Memory(
        limit=fields.int("limit", -1) or None,
        reservation=fields.int("reservation", -1) or None,
        swap=fields.int("swap", -1) or None,
        kernel_tcp=fields.int("kernelTCP", -1) or None,
        swappiness=fields.optional_int("swappiness", 0, 100),
        disable_oom_killer=fields.optional_bool("disableOOMKiller"),
        check_before_update=fields.optional_bool("checkBeforeUpdate"),
    )


def _cpu(fields: Fields | None) -> Cpu:
    if fields is None:
        return Cpu()
    return Cpu(
        shares=fields.int("shares", 0, _UINT64) or None,
        quota=_quota(fields.int("quota")),
        period=fields.int("period", 0, _UINT64) or None,
        burst=fields.optional_int("burst", 0, _INT64),
        realtime_runtime=fields.int("realtimeRuntime", -1) or None,
        realtime_period=fields.int("realtimePeriod", 0, _UINT64) or None,
        idle=fields.optional_int("idle", 0, 1),
    )


def _quota(value: int) -> int | None:
    # Any negative quota means unlimited to the kernel; 0 is "not given".
    return max(value, -1) or None


def _cpu_list(fields: Fields, key: str) -> str | None:
    text = fields.str(key)
    if not text:
        return None
    if len(text) > 4096 or not _CPU_LIST.fullmatch(text):
        raise fields.error(key, f"expected a list such as 0-3,7, got {text[:60]!r}")
    return text


def _pids(fields: Fields | None) -> Pids:
    if fields is None:
        return Pids()
    limit = fields.optional_int("limit")
    return Pids(None if limit is None else max(limit, -1))


def _blkio(fields: Fields | None) -> Blkio:
    if fields is None:
        return Blkio()
    weights = [(_block_device(item), item) for item in _bounded(fields, "weightDevice")]
    return Blkio(
        weight=_weight(fields, "weight"),
        leaf_weight=_weight(fields, "leafWeight"),
        weight_devices=_weights(weights, "weight"),
        leaf_weight_devices=_weights(weights, "leafWeight"),
        read_bps=_rates(fields, "throttleReadBpsDevice"),
        write_bps=_rates(fields, "throttleWriteBpsDevice"),
        read_iops=_rates(fields, "throttleReadIOPSDevice"),
        write_iops=_rates(fields, "throttleWriteIOPSDevice"),
    )


def _weight(fields: Fields, key: str) -> int | None:
    if not fields.int(key, 0, 1000):
        return None
    return fields.int(key, 10, 1000)


def _weights(items: list[tuple[tuple[int, int], Fields]], key: str) -> tuple[DeviceValue, ...]:
    return tuple(DeviceValue(*device, weight) for device, item in items if (weight := _weight(item, key)))


def _rates(fields: Fields, key: str) -> tuple[DeviceValue, ...]:
    return tuple(DeviceValue(*_block_device(item), item.int("rate", 0, _UINT64)) for item in _bounded(fields, key))


def _block_device(fields: Fields) -> tuple[int, int]:
    return fields.int("major", 0, _UINT32, required=True), fields.int("minor", 0, _UINT32, required=True)


def _hugepages(fields: Fields) -> HugePages:
    # The page size becomes part of a file name: "2MB/../../x" would leave the cgroup.
    size = fields.str("pageSize", required=True)
    if not _PAGE_SIZE.fullmatch(size):
        raise fields.error("pageSize", f"expected a size such as 2MB or 1GB, got {size[:60]!r}")
    return HugePages(size, fields.int("limit", 0, _UINT64, required=True))


def _device(fields: Fields) -> DeviceRule:
    kind = fields.str("type", "a", choices=("a", "b", "c", "u", "")) or "a"
    major, minor = fields.optional_int("major", -1, _UINT32), fields.optional_int("minor", -1, _UINT32)
    access = fields.str("access")
    if access.strip("rwm"):
        raise fields.error("access", f"expected letters out of rwm, got {access[:20]!r}")
    access = "".join(letter for letter in "rwm" if letter in access)
    rule = DeviceRule(
        allow=fields.bool("allow"),
        type="c" if kind == "u" else kind,  # mknod(1) calls an unbuffered character device u
        major=-1 if major is None else major,
        minor=-1 if minor is None else minor,
        access=access,
    )
    if rule.type == "a":
        # The kernel reads "a" as everything, whatever follows: a narrower rule would be widened in silence.
        if rule.major != -1 or rule.minor != -1 or access not in ("", "rwm"):
            raise fields.error("type", 'a rule for type "a" is for every device and every access: name b or c')
        return rule._replace(access="rwm")
    if not access:
        raise fields.error("access", "is required for one type of device")
    return rule


def _unified(fields: Fields) -> tuple[tuple[str, str], ...]:
    items = fields.mapping("unified")
    if len(items) > _MAX_RULES:
        raise fields.error("unified", f"{len(items)} entries, at most {_MAX_RULES} are taken")
    for key, value in items.items():
        # A key is a file name in the cgroup: "cgroup.procs" would move processes, "../memory.max" leave it.
        if len(key) > 128 or not _UNIFIED_KEY.fullmatch(key) or key.startswith("cgroup."):
            raise fields.error("unified", f"{key[:60]!r} is no controller's file, such as memory.high")
        if len(value) > 4096 or not value.isprintable() and not value.replace("\n", "").isprintable():
            raise fields.error("unified", f"the value of {key} is too long or holds control characters")
    return tuple(sorted(items.items()))
