"""The three files of /etc that a pod brings along: hosts, hostname, resolv.conf, as text.

Refuses to write anything and to put an unchecked word into a line. Invariant: every line is made of words that were
matched against a pattern, so nothing from a request starts a line of its own.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence

from cri.spec.validate import InvalidRequest
from runtime.linux.files import read_bounded
from runtime.linux.libc import KernelError

MAX_HOST_FILE = 64 << 10
MAX_DNS_ENTRIES = 64
_SEARCH = re.compile(r"[A-Za-z0-9_.-]{1,253}", re.ASCII)
_OPTION = re.compile(r"[A-Za-z0-9_:.-]{1,128}", re.ASCII)


def hosts(hostname: str, addresses: Sequence[str]) -> str:
    """/etc/hosts of a pod with its own network: loopback, the usual IPv6 names, the pod's addresses."""
    lines = [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "fe00::0\tip6-localnet",
        "fe00::0\tip6-mcastprefix",
        "fe00::1\tip6-allnodes",
        "fe00::2\tip6-allrouters",
    ]
    lines += [f"{ipaddress.ip_address(address)}\t{hostname}" for address in addresses if hostname]
    return "\n".join(lines) + "\n"


def host_file(path: str) -> str:
    """A file of the host's /etc as it is, bounded; "" when there is none. For pods in the host's network."""
    try:
        return read_bounded(-100, path, MAX_HOST_FILE).decode("utf-8", "surrogateescape")
    except KernelError as error:
        if error.errno == 2:
            return ""
        raise


def resolv_conf(servers: Sequence[str], searches: Sequence[str], options: Sequence[str]) -> str:
    """resolv.conf(5) of what the request's DNSConfig says. Raises InvalidRequest naming the field."""
    for field, values in (("servers", servers), ("searches", searches), ("options", options)):
        if len(values) > MAX_DNS_ENTRIES:
            raise InvalidRequest(f"dns_config.{field}: {len(values)} entries, at most {MAX_DNS_ENTRIES}")
    lines = []
    if searches:
        # "." alone is legal: kubelet sends it for an empty search list.
        lines.append("search " + " ".join(_matching("searches", word, _SEARCH) for word in searches))
    for server in servers:
        address, _, scope = server.partition("%")
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise InvalidRequest(f"dns_config.servers: {server[:60]!r} is no IP address") from None
        lines.append(f"nameserver {address}" + (f"%{_matching('servers', scope, _SEARCH)}" if scope else ""))
    if options:
        lines.append("options " + " ".join(_matching("options", word, _OPTION) for word in options))
    return "".join(f"{line}\n" for line in lines)


def _matching(field: str, word: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(word):
        raise InvalidRequest(f"dns_config.{field}: {word[:60]!r} holds characters that it must not")
    return word


def host_name() -> str:
    """The node's own host name: what a pod in the host's network sees."""
    return os.uname().nodename
