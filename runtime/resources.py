"""`linux.resources` of runtime-spec as values: parsed once, merged for an update, understood by runtime.cgroups.

Refuses by path what no cgroup takes, and every name that could leave the cgroup's directory (threats S19). Invariant:
None is "not given", and a 0 that the ecosystem writes for "not given" (limits, shares, quotas, weights) reads as None.
"""

from __future__ import annotations

from runtime.linux.record import Record

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from typing import TypeVar

    from runtime.fields import Fields

    R = TypeVar("R", bound=Record)

_UINT32, _INT64, _UINT64 = (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1
_MAX_RULES = 4096  # devices, throttles, unified keys: far above any real container, far below trouble


class Memory(Record):
    """Bytes; -1 is unlimited. `swap` is memory and swap together, as in cgroup v1 and the spec."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None
    kernel_tcp: int | None = None
    swappiness: int | None = None
    disable_oom_killer: bool | None = None
    check_before_update: bool | None = None
    use_hierarchy: bool | None = None


class Cpu(Record):
    """Microseconds, but for `shares`; a `quota` of -1 is unlimited."""

    shares: int | None = None
    quota: int | None = None
    period: int | None = None
    burst: int | None = None
    realtime_runtime: int | None = None
    realtime_period: int | None = None
    idle: int | None = None


class Cpuset(Record):
    """Lists such as "0-3,7"."""

    cpus: str | None = None
    mems: str | None = None


class Pids(Record):
    """-1 is unlimited."""

    limit: int | None = None


class DeviceValue(Record):
    """A weight or a rate of one block device."""

    major: int
    minor: int
    value: int


class Blkio(Record):
    """Weights are 10..1000; rates are bytes or operations a second, 0 lifts one."""

    weight: int | None = None
    leaf_weight: int | None = None
    weight_devices: tuple[DeviceValue, ...] = ()
    leaf_weight_devices: tuple[DeviceValue, ...] = ()
    read_bps: tuple[DeviceValue, ...] = ()
    write_bps: tuple[DeviceValue, ...] = ()
    read_iops: tuple[DeviceValue, ...] = ()
    write_iops: tuple[DeviceValue, ...] = ()


class HugePages(Record):
    page_size: str
    limit: int


class Network(Record):
    """The class of the container's packets, and what priority they have on an interface."""

    class_id: int | None = None
    priorities: tuple[tuple[str, int], ...] = ()


class RdmaDevice(Record):
    """How much of one RDMA device; None: no limit was given."""

    name: str
    handles: int | None = None
    objects: int | None = None


class DeviceRule(Record):
    """`type` is a (all), b or c; a number of -1 is a wildcard; `access` is a subset of "rwm"."""

    allow: bool
    type: str
    major: int
    minor: int
    access: str


class Resources(Record):
    """All of it. `devices` None: the rules are not to be touched; (): deny all but the default devices."""

    memory: Memory = Memory()
    cpu: Cpu = Cpu()
    cpuset: Cpuset = Cpuset()
    pids: Pids = Pids()
    blkio: Blkio = Blkio()
    hugetlb: tuple[HugePages, ...] = ()
    devices: tuple[DeviceRule, ...] | None = None
    unified: tuple[tuple[str, str], ...] = ()
    network: Network = Network()
    rdma: tuple[RdmaDevice, ...] = ()


def parse(fields: Fields) -> Resources:
    """The object `linux.resources`. Raises FieldError naming what is wrong by its path."""
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
        network=_network(fields.object("network")),
        rdma=_rdma(fields.object("rdma")),
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
        hugetlb=_merge_keyed(base.hugetlb, over.hugetlb, "page_size"),
        devices=base.devices if over.devices is None else over.devices,
        unified=tuple(sorted({**dict(base.unified), **dict(over.unified)}.items())),
        network=Network(
            base.network.class_id if over.network.class_id is None else over.network.class_id,
            tuple({**dict(base.network.priorities), **dict(over.network.priorities)}.items()),
        ),
        rdma=_merge_keyed(base.rdma, over.rdma, "name"),
    )


def _merge_flat(base: R, over: R) -> R:
    given = {name: value for name in over._fields if (value := getattr(over, name)) is not None}
    return base.changed(**given)


def _merge_keyed(base: tuple[R, ...], over: tuple[R, ...], *key: str) -> tuple[R, ...]:
    """The last of those whose fields `key` are the same."""
    return tuple({tuple(getattr(item, name) for name in key): item for item in (*base, *over)}.values())


def _merge_blkio(base: Blkio, over: Blkio) -> Blkio:
    def devices(name: str) -> tuple[DeviceValue, ...]:
        return _merge_keyed(getattr(base, name), getattr(over, name), "major", "minor")

    return Blkio(
        weight=base.weight if over.weight is None else over.weight,
        leaf_weight=base.leaf_weight if over.leaf_weight is None else over.leaf_weight,
        weight_devices=devices("weight_devices"),
        leaf_weight_devices=devices("leaf_weight_devices"),
        read_bps=devices("read_bps"),
        write_bps=devices("write_bps"),
        read_iops=devices("read_iops"),
        write_iops=devices("write_iops"),
    )


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
        use_hierarchy=fields.optional_bool("useHierarchy"),
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
    if len(text) > 4096 or not _is_list(text):
        raise fields.error(key, f"expected a list such as 0-3,7, got {text[:60]!r}")
    return text


def _is_list(text: str) -> bool:
    """As the kernel's bitmap_parselist reads it: "0-3,7", "0-31:2/4"."""
    for part in text.split(","):
        span, colon, stride = part.partition(":")
        first, dash, last = span.partition("-")
        numbers = [first, last] if dash else [first]
        if colon:
            used, slash, group = stride.partition("/")
            if not dash or not slash:
                return False
            numbers += [used, group]
        if not all(number.isascii() and number.isdigit() for number in numbers):
            return False
    return True


def _is_page_size(text: str) -> bool:
    number = text[:-2]
    plain = number.isascii() and number.isdigit() and number[0] != "0" and len(number) < 10
    return plain and text[-2:] in ("KB", "MB", "GB")


def _is_controller_file(key: str) -> bool:
    controller, *rest = key.split(".")
    words = all(word.isascii() and word.replace("_", "x").isalnum() for word in (controller, *rest))
    return bool(rest) and len(key) <= 128 and words and controller not in ("", "cgroup")


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
    if not _is_page_size(size):
        raise fields.error("pageSize", f"expected a size such as 2MB or 1GB, got {size[:60]!r}")
    return HugePages(size, fields.int("limit", 0, _UINT64, required=True))


def _network(fields: Fields | None) -> Network:
    if fields is None:
        return Network()
    priorities = []
    for item in _bounded(fields, "priorities"):
        name = item.str("name", required=True)
        if not _is_word(name) or len(name) > 15:  # IFNAMSIZ
            raise item.error("name", f"{name[:60]!r} is no name of a network interface")
        priorities.append((name, item.int("priority", 0, _UINT32)))
    return Network(fields.int("classID", 0, _UINT32) or None, tuple(priorities))


def _rdma(fields: Fields | None) -> tuple[RdmaDevice, ...]:
    found: list[RdmaDevice] = []
    if fields is None:
        return ()
    for name in fields.names():
        # It begins a line of rdma.max: a blank or a line break would begin another.
        if not _is_word(name) or len(name) > 64:
            raise fields.error("", f"{name[:60]!r} is no name of an RDMA device")
        item = fields.required_object(name)
        handles, objects = (item.optional_int(key, 0, _UINT32) for key in ("hcaHandles", "hcaObjects"))
        if handles is None and objects is None:
            raise item.error("", "needs hcaHandles, hcaObjects or both")
        found.append(RdmaDevice(name, handles, objects))
    return tuple(found)


def _is_word(name: str) -> bool:
    return bool(name) and name.isascii() and name.isprintable() and not set(name) & set(" /")


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
        return rule.changed(access="rwm")
    if not access:
        raise fields.error("access", "is required for one type of device")
    return rule


def _unified(fields: Fields) -> tuple[tuple[str, str], ...]:
    items = fields.mapping("unified")
    if len(items) > _MAX_RULES:
        raise fields.error("unified", f"{len(items)} entries, at most {_MAX_RULES} are taken")
    for key, value in items.items():
        # A key is a file name in the cgroup: "cgroup.procs" would move processes, "../memory.max" leave it.
        if not _is_controller_file(key):
            raise fields.error("unified", f"{key[:60]!r} is no controller's file, such as memory.high")
        if len(value) > 4096 or not value.isprintable() and not value.replace("\n", "").isprintable():
            raise fields.error("unified", f"the value of {key} is too long or holds control characters")
    return tuple(sorted(items.items()))
