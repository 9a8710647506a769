"""namespace_options.userns_options as a pod's user namespace: which ids it has, and whether a container fits in.

Refuses, by field, what the kernel would refuse later with EINVAL (user_namespaces(7)), and a namespace without a root.
Invariant: no ids, no user namespace; what is returned may be written to uid_map and gid_map as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from cri.api import api_pb2 as pb
from cri.interfaces import IdMap
from cri.spec.validate import InvalidRequest

_FIELD = "namespace_options.userns_options"
# user_namespaces(7): at most so many lines; the largest id is nobody's.
MAX_MAPPINGS = 340
_TOP_ID = (1 << 32) - 1


def of_pod(options: pb.NamespaceOption) -> IdMap | None:
    """The ids of the pod's user namespace; None for the host's. Raises InvalidRequest."""
    asked = options.userns_options
    if not options.HasField("userns_options") or asked.mode == pb.NODE:
        if asked.uids or asked.gids:
            raise InvalidRequest(f"{_FIELD}: mode NODE takes no mappings")
        return None
    if asked.mode != pb.POD:
        raise InvalidRequest(f"{_FIELD}.mode: a pod's is POD or NODE")
    ids = IdMap(lines(f"{_FIELD}.uids", asked.uids), lines(f"{_FIELD}.gids", asked.gids))
    for name, found in (("uids", ids.uids), ("gids", ids.gids)):
        if not any(inside == 0 for inside, _, _ in found):
            raise InvalidRequest(f"{_FIELD}.{name}: id 0 of the container must be mapped")
    return ids


def check_container(pod: IdMap | None, options: pb.NamespaceOption) -> None:
    """A container is in its pod's user namespace: it may say so once more, and nothing else. Raises InvalidRequest."""
    if options.HasField("userns_options") and of_pod(options) != pod:
        raise InvalidRequest(f"{_FIELD}: a container's must be those of its pod sandbox")


def lines(field: str, mappings: Sequence[pb.IDMapping]) -> tuple[tuple[int, int, int], ...]:
    """(container, host, length) of each, ordered, without overlaps. Raises InvalidRequest."""
    if len(mappings) > MAX_MAPPINGS:
        raise InvalidRequest(f"{field}: {len(mappings)} mappings, the kernel takes {MAX_MAPPINGS}")
    found = sorted((one.container_id, one.host_id, one.length) for one in mappings)
    for inside, outside, length in found:
        if not length:
            raise InvalidRequest(f"{field}: a mapping of no ids")
        if max(inside, outside) + length > _TOP_ID:
            raise InvalidRequest(f"{field}: a mapping goes beyond the largest id, {_TOP_ID - 1}")
    for side, column in (("container", 0), ("host", 1)):
        ranges = sorted((line[column], line[2]) for line in found)
        for (start, length), (following, _) in zip(ranges, ranges[1:], strict=False):
            if start + length > following:
                raise InvalidRequest(f"{field}: {side} ids from {following} are mapped twice")
    return tuple(found)


def of_mount(field: str, mount: pb.Mount) -> IdMap | None:
    """The ids that a mount's files are shown with; None for their own. Raises InvalidRequest."""
    uids, gids = lines(f"{field}.uidMappings", mount.uidMappings), lines(f"{field}.gidMappings", mount.gidMappings)
    if bool(uids) != bool(gids):
        raise InvalidRequest(f"{field}.{'gidMappings' if uids else 'uidMappings'}: both are needed, or none")
    return IdMap(uids, gids) if uids else None


def as_oci(mappings: Sequence[tuple[int, int, int]]) -> list[dict[str, int]]:
    """runtime-spec's words for them."""
    return [{"containerID": inside, "hostID": outside, "size": length} for inside, outside, length in mappings]
