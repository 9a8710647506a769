"""What a pod's request has for CNI plugins that ask for it by their `capabilities`. Pure.

Refuses a bandwidth that is no quantity, by its annotation, before anything is made. Invariant: the same request gives
the same values, so that DEL tells a plugin what ADD did.
See the CNI repository's CONVENTIONS.md, "Dynamic Plugin specific fields".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from cri.api import api_pb2 as pb
from cri.errors import InvalidArgument

# What Kubernetes' own bandwidth annotations may say, in bits per second.
_LEAST, _MOST = 10**3, 10**15
_BURST = (1 << 32) - 1  # the most that the plugin takes: the rate is the limit
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([numkMGTPE]|[KMGTPE]i)?", re.ASCII)
_SCALES = {
    "": Decimal(1),
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(1000),
    **{letter: Decimal(1000) ** power for power, letter in enumerate("MGTPE", 2)},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
}


def capabilities(config: pb.PodSandboxConfig) -> Mapping[str, object]:
    """By the names of the conventions; what the pod does not have is not there. Raises InvalidArgument."""
    found: dict[str, object] = {}
    if config.HasField("dns_config"):
        dns = config.dns_config
        found["dns"] = {
            "servers": list(dns.servers),
            "searches": list(dns.searches),
            "options": list(dns.options),
        }
    if bandwidth := _bandwidth(config.annotations):
        found["bandwidth"] = bandwidth
    if config.linux.cgroup_parent:
        found["cgroupPath"] = config.linux.cgroup_parent
    if config.annotations:
        found["io.kubernetes.cri.pod-annotations"] = dict(config.annotations)
    return found


def _bandwidth(annotations: Mapping[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for way in ("ingress", "egress"):
        key = f"kubernetes.io/{way}-bandwidth"
        if text := annotations.get(key, ""):
            found |= {f"{way}Rate": _bits(key, text), f"{way}Burst": _BURST}
    return found


def _bits(key: str, text: str) -> int:
    match = _QUANTITY.fullmatch(text)
    bits = int(Decimal(match[1]) * _SCALES[match[2] or ""]) if match else 0
    if not _LEAST <= bits <= _MOST:
        raise InvalidArgument(f"annotations: {key}: expected bits per second from 1k to 1P, got {text[:60]!r}")
    return bits
