"""What a CRI client may say: names, hostnames, log paths, sysctls, annotations.

Refuses by raising `InvalidRequest`, which names the field; repairs nothing. Invariant: what passed here may become a
path component, a sysctl file or a line of a generated file without another look (threats S57, S59, S61).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

MAX_NAME = 253
MAX_ANNOTATIONS = 256 << 10
MAX_SYSCTLS = 256

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_UID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?", re.ASCII)
_OF_INTERFACE = re.compile(r"net\.ipv[46]\.(?:conf|neigh)\.([^.]+)\.")
_SYSCTL_KEY = re.compile(r"[a-z0-9_-]+(?:[./][A-Za-z0-9_:@-]+)+", re.ASCII)
_SYSCTL_VALUE = re.compile(r"[A-Za-z0-9 \t._:,/@-]{0,4096}", re.ASCII)
_IPC_SYSCTLS = frozenset(
    {
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
    }
)


class InvalidRequest(ValueError):
    """The request is wrong in a way that the same request always will be: INVALID_ARGUMENT."""


def name(field: str, value: str) -> str:
    """`value` if it may be a Kubernetes object's name: a DNS-like word, no separator, at most 253 bytes."""
    if len(value) > MAX_NAME or not _NAME.fullmatch(value):
        raise InvalidRequest(f"{field}: {value[:80]!r} is no name (letters, digits, '.', '_', '-'; at most {MAX_NAME})")
    return value


def uid(field: str, value: str) -> str:
    """`value` if it may be a pod's uid."""
    if len(value) > MAX_NAME or not _UID.fullmatch(value):
        raise InvalidRequest(f"{field}: {value[:80]!r} is no uid")
    return value


def hostname(value: str) -> str:
    """`value` if it may be a host's name: sethostname(2) takes 64 bytes, and it becomes a line of /etc/hosts."""
    if len(value) > 64 or (value and not _HOSTNAME.fullmatch(value)):
        raise InvalidRequest(f"hostname: {value[:80]!r} is no host name of at most 64 letters, digits, '.' and '-'")
    return value


def log_directory(value: str) -> str:
    """`value` if it is an absolute path without '..' or empty."""
    if value and (not value.startswith("/") or ".." in value.split("/") or "\0" in value or "\n" in value):
        raise InvalidRequest(f"log_directory: {value[:80]!r} must be an absolute path without '..'")
    return value


def log_path(value: str) -> str:
    """`value` if it is a relative path without '..' or empty: it is joined to the pod's log_directory."""
    if value and (value.startswith("/") or ".." in value.split("/") or "\0" in value or "\n" in value):
        raise InvalidRequest(f"log_path: {value[:80]!r} must be a relative path without '..'")
    return value


def annotation_sizes(field: str, values: Mapping[str, str]) -> None:
    """Bounds the sum of an annotation or label map, as Kubernetes does (256 KiB)."""
    if sum(len(key) + len(value) for key, value in values.items()) > MAX_ANNOTATIONS:
        raise InvalidRequest(f"{field}: more than {MAX_ANNOTATIONS} bytes in all")


def passed(annotations: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    """Those annotations whose key one of the operator's patterns matches; our own names are never taken over."""
    return {
        key: value
        for key, value in annotations.items()
        if not key.startswith(("io.kubernetes.cri.", "ocid."))
        and any(fnmatch.fnmatchcase(key, one) for one in patterns)
    }


def names_interface(key: str) -> bool:
    """Whether a sysctl of `sysctls` is there only once its interface is."""
    match = _OF_INTERFACE.match(key)
    return match is not None and match[1] not in ("all", "default", "lo")


def sysctls(values: Mapping[str, str], *, private_network: bool, private_ipc: bool) -> dict[str, str]:
    """The pod's sysctls with dotted keys. Only what belongs to a namespace that is the pod's own passes: anything
    else would change the host (CVE-2022-0811). See proc_sys_kernel(5), proc_sys_net(5)."""
    if len(values) > MAX_SYSCTLS:
        raise InvalidRequest(f"sysctls: {len(values)} of them, at most {MAX_SYSCTLS}")
    checked = {}
    for raw, value in values.items():
        if len(raw) > MAX_NAME or not _SYSCTL_KEY.fullmatch(raw) or ".." in raw:
            raise InvalidRequest(f"sysctls: {raw[:80]!r} is no sysctl name")
        if not _SYSCTL_VALUE.fullmatch(value):
            raise InvalidRequest(f"sysctls.{raw}: {value[:80]!r} holds characters that no sysctl value has")
        # As in sysctl.d(5), the first separator decides: in "net/ipv4/conf/eth0.1/x" the dot belongs to the name.
        first = next(c for c in raw if c in "./")
        parts = raw.split(first)
        key = ".".join(part.replace(".", "/") for part in parts)
        if key.startswith("net."):
            if not private_network:
                raise InvalidRequest(f"sysctls.{raw}: not with the host's network namespace")
        elif key in _IPC_SYSCTLS or key.startswith("fs.mqueue."):
            if not private_ipc:
                raise InvalidRequest(f"sysctls.{raw}: not with the host's IPC namespace")
        else:
            raise InvalidRequest(f"sysctls.{raw}: not namespaced, it would change the host")
        checked[key] = value
    return checked
