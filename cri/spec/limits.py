"""LinuxContainerResources as runtime-spec `linux.resources`.

Refuses numbers and names out of range by their field. Invariant: a zero in the request, which is how protobuf says
"not given", sets nothing.
"""

from __future__ import annotations

import re
from typing import Any

from cri.api import api_pb2 as pb
from cri.spec.validate import InvalidRequest

_CPU_LIST = re.compile(r"[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*", re.ASCII)
_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,6}(?:KB|MB|GB)", re.ASCII)
_UNIFIED_KEY = re.compile(r"[a-z]+(?:\.[A-Za-z0-9_]+)+", re.ASCII)
_UNIFIED_VALUE = re.compile(r"[A-Za-z0-9 .:,=/-]{0,1024}(?:\n[A-Za-z0-9 .:,=/-]{0,1024})*", re.ASCII)


def build(resources: pb.LinuxContainerResources) -> dict[str, Any]:
    """What of `resources` is given, as runtime-spec. Raises InvalidRequest naming the field."""
    for field in ("cpu_period", "cpu_shares"):
        _at_least(field, getattr(resources, field), 0)
    for field in ("cpu_quota", "memory_limit_in_bytes", "memory_swap_limit_in_bytes"):
        _at_least(field, getattr(resources, field), -1)
    cpu: dict[str, Any] = {}
    for key, number in (
        ("period", resources.cpu_period),
        ("quota", resources.cpu_quota),
        ("shares", resources.cpu_shares),
    ):
        if number:
            cpu[key] = number
    for key, text in (("cpus", resources.cpuset_cpus), ("mems", resources.cpuset_mems)):
        if text:
            if len(text) > 4096 or not _CPU_LIST.fullmatch(text):
                raise InvalidRequest(f"resources.cpuset_{key}: {text[:60]!r} is no list such as 0-3,7")
            cpu[key] = text
    memory: dict[str, Any] = {}
    if resources.memory_limit_in_bytes:
        memory["limit"] = resources.memory_limit_in_bytes
    if resources.memory_swap_limit_in_bytes:
        memory["swap"] = resources.memory_swap_limit_in_bytes
    built: dict[str, Any] = {}
    if cpu:
        built["cpu"] = cpu
    if memory:
        built["memory"] = memory
    # A kubelet forbids (limit 0) every page size that it knows; where the node has no such pages that says nothing,
    # and asking for it would need a controller that may not be there.
    pages = [_hugepages(limit) for limit in resources.hugepage_limits]
    pages = [page for page in pages if page["limit"] or _has_pages(page["pageSize"])]
    if pages:
        built["hugepageLimits"] = pages
    if resources.unified:
        built["unified"] = {_unified(key, value): value for key, value in sorted(resources.unified.items())}
    return built


def build_pod(resources: pb.LinuxContainerResources) -> dict[str, Any]:
    """As `build`, for a pod as a whole. Raises InvalidRequest naming the field."""
    if resources.oom_score_adj:
        raise InvalidRequest(
            "resources.oom_score_adj: a pod has no process of its own that anybody could choose; its containers have"
        )
    return build(resources)


def merge(kept: pb.LinuxContainerResources, given: pb.LinuxContainerResources) -> None:
    """Puts what `given` gives over `kept`: what is not given stays, and a page size has one limit."""
    pages = {limit.page_size: limit.limit for limit in (*kept.hugepage_limits, *given.hugepage_limits)}
    kept.MergeFrom(given)
    del kept.hugepage_limits[:]
    kept.hugepage_limits.extend(pb.HugepageLimit(page_size=size, limit=limit) for size, limit in pages.items())


def oom_score_adj(resources: pb.LinuxContainerResources) -> int:
    """-1000..1000, proc_pid_oom_score_adj(5)."""
    value: int = resources.oom_score_adj
    if not -1000 <= value <= 1000:
        raise InvalidRequest(f"resources.oom_score_adj: {value} is not from -1000 to 1000")
    return value


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidRequest(f"resources.{field}: {value} is less than {least}")


def _hugepages(limit: pb.HugepageLimit) -> dict[str, Any]:
    if not _PAGE_SIZE.fullmatch(limit.page_size):
        raise InvalidRequest(f"resources.hugepage_limits: {limit.page_size[:40]!r} is no page size such as 2MB")
    return {"pageSize": limit.page_size, "limit": limit.limit}


_KIB = {"KB": 1, "MB": 1 << 10, "GB": 1 << 20}


def _has_pages(size: str) -> bool:
    """True when the node has reserved huge pages of this size, such as "2MB" (hugetlbpage.rst, "nr_hugepages")."""
    path = f"/sys/kernel/mm/hugepages/hugepages-{int(size[:-2]) * _KIB[size[-2:]]}kB/nr_hugepages"
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip() != "0"
    except FileNotFoundError:
        return False


def _unified(key: str, value: str) -> str:
    # A key is a file name in the cgroup: "cgroup.procs" would move processes, "../x" leave it (threats S19).
    if len(key) > 128 or not _UNIFIED_KEY.fullmatch(key) or key.startswith("cgroup."):
        raise InvalidRequest(f"resources.unified: {key[:60]!r} is no controller file")
    if not _UNIFIED_VALUE.fullmatch(value):
        raise InvalidRequest(f"resources.unified.{key}: {value[:60]!r} holds characters that no controller takes")
    return key
