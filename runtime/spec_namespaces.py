"""linux.namespaces, linux.uidMappings, linux.gidMappings and linux.timeOffsets of config.json as frozen values.

Refuses by path what the kernel would refuse later with a bare EINVAL, and what would change somebody else's container:
a mount namespace to join, since its root would be pivoted away from under everyone who is in it. Invariant: the order
of linux.namespaces means nothing, the mappings are written to uid_map and gid_map exactly as they are given.
"""

from __future__ import annotations

from runtime.linux.record import Record
from runtime.namespaces import FLAGS, Namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.fields import Fields

# user_namespaces(7): at most so many lines, in one write(2) of less than a page.
MAX_MAPPINGS = 340
_MAP_BYTES = 4096
_TOP_ID = (1 << 32) - 1  # (uid_t) -1, which is nobody's id
_NANOSECONDS = 10**9
# The clocks that time_namespaces(7) gives offsets, under the names that timens_offsets takes.
CLOCKS = ("monotonic", "boottime")


class IdMapping(Record):
    """One line of uid_map or gid_map (user_namespaces(7))."""

    container: int
    host: int
    size: int


class TimeOffset(Record):
    """One line of timens_offsets (time_namespaces(7))."""

    clock: str
    seconds: int
    nanoseconds: int


def map_text(mappings: tuple[IdMapping, ...]) -> str:
    """What uid_map and gid_map are written."""
    return "".join(f"{m.container} {m.host} {m.size}\n" for m in mappings)


def namespaces(linux: Fields) -> tuple[Namespace, ...]:
    """linux.namespaces."""
    found: dict[str, Namespace] = {}
    for entry in linux.objects("namespaces"):
        kind = entry.str("type", required=True)
        if kind not in FLAGS:
            raise entry.error("type", f'unknown namespace "{kind:.40}"')
        if kind in found:
            raise entry.error("type", f'namespace "{kind}" is given twice')
        path = entry.str("path")
        if path and not path.startswith("/"):
            raise entry.error("path", f'expected an absolute path, got "{path:.80}"')
        if path and kind == "mount":
            raise entry.error("path", "a mount namespace cannot be joined: the root of all who are in it would change")
        found[kind] = Namespace(kind, path)
    if "mount" not in found:
        raise linux.error("namespaces", 'a "mount" namespace is required: without it the host\'s root would be pivoted')
    return tuple(found.values())


def mappings(linux: Fields, key: str) -> tuple[IdMapping, ...]:
    """linux.uidMappings or linux.gidMappings (`key`)."""
    found = tuple(
        IdMapping(
            entry.int("containerID", 0, _TOP_ID, required=True),
            entry.int("hostID", 0, _TOP_ID, required=True),
            entry.int("size", 1, _TOP_ID, required=True),
        )
        for entry in linux.objects(key)
    )
    if len(found) > MAX_MAPPINGS:
        raise linux.error(key, f"{len(found)} mappings, the kernel takes at most {MAX_MAPPINGS}")
    if (size := len(map_text(found))) >= _MAP_BYTES:
        raise linux.error(key, f"{size} bytes of mappings, the kernel takes less than {_MAP_BYTES}")
    for index, mapping in enumerate(found):
        if max(mapping.container, mapping.host) + mapping.size > _TOP_ID:
            raise linux.error(f"{key}[{index}]", f"goes beyond the largest id, {_TOP_ID - 1}")
    for name in ("container", "host"):
        _refuse_overlaps(linux, key, [(getattr(mapping, name), mapping.size) for mapping in found], name)
    return found


def _refuse_overlaps(linux: Fields, key: str, ranges: list[tuple[int, int]], name: str) -> None:
    order = sorted(range(len(ranges)), key=ranges.__getitem__)
    for one, two in zip(order, order[1:], strict=False):
        if sum(ranges[one]) > ranges[two][0]:
            raise linux.error(f"{key}[{two}]", f"has {name} ids that are in {key}[{one}] already")


def time_offsets(linux: Fields) -> tuple[TimeOffset, ...]:
    """linux.timeOffsets."""
    fields = linux.object("timeOffsets")
    if fields is None:
        return ()
    found = []
    for clock in fields.names():
        if clock not in CLOCKS:
            raise fields.error(clock, f"there is no such clock: {' and '.join(CLOCKS)} have offsets")
        if (entry := fields.object(clock)) is not None:
            found.append(TimeOffset(clock, entry.int("secs"), entry.int("nanosecs", 0, _NANOSECONDS - 1)))
    return tuple(found)


def check(
    linux: Fields,
    wanted: tuple[Namespace, ...],
    uids: tuple[IdMapping, ...],
    gids: tuple[IdMapping, ...],
    offsets: tuple[TimeOffset, ...],
) -> None:
    """Raises FieldError where namespaces, mappings and offsets do not fit one another, in the peers' words."""
    paths = {namespace.kind: namespace.path for namespace in wanted}
    if "user" not in paths and (uids or gids):
        key = "uidMappings" if uids else "gidMappings"
        raise linux.error(key, "user namespace mappings specified, but user namespace isn't enabled in the config")
    if "user" in paths and (uids or gids or not paths["user"]):
        for key, word, found in (("uidMappings", "uid", uids), ("gidMappings", "gid", gids)):
            if not found:
                raise linux.error(key, f"user namespaces enabled, but no {word} mappings found")
            if not any(mapping.container == 0 for mapping in found):
                raise linux.error(key, f"user namespaces enabled, but no mapping found for {word} 0")
    if offsets and "time" not in paths:
        problem = "time namespace offsets specified, but time namespace isn't enabled in the config"
        raise linux.error("timeOffsets", problem)
    if offsets and paths["time"]:
        problem = "both namespace path and time offsets specified: the offsets of a time namespace never change"
        raise linux.error("timeOffsets", problem)
