"""Which proxy a request goes through: HTTP_PROXY, HTTPS_PROXY and NO_PROXY of the environment, as everybody reads them.

Pure but for the environment handed in. Refuses proxies other than http:// and https:// ones. Invariant: this machine's
own addresses are never asked for through a proxy, and a proxy's password stands in no message.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from imagestore.model import ImageError
from imagestore.reference import is_loopback


def proxy_for(url: str, environment: Mapping[str, str]) -> str | None:
    """The proxy's URL for `url`, or None for a direct connection. Raises ImageError for one that cannot be meant."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    found = _variable(environment, f"{parts.scheme}_proxy")
    if not found or is_loopback(host) or _excluded(host, parts.port, _variable(environment, "no_proxy")):
        return None
    proxy = found if "://" in found else f"http://{found}"
    try:
        proxied = urlsplit(proxy)
        valid = proxied.scheme in ("http", "https") and proxied.hostname and (proxied.port is None or proxied.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise ImageError(f"{parts.scheme.upper()}_PROXY of the environment is no http://host:port")
    return proxy


def _variable(environment: Mapping[str, str], name: str) -> str:
    return (environment.get(name) or environment.get(name.upper()) or "").strip()


def _excluded(host: str, port: int | None, excluded: str) -> bool:
    """NO_PROXY: "*", hosts with their subdomains (with or without a leading dot), host:port, addresses, networks."""
    host = host.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    for item in excluded.lower().split(","):
        item = item.strip()
        if item == "*":
            return True
        if address is not None:
            try:
                if address in ipaddress.ip_network(item, strict=False):
                    return True
            except ValueError:
                pass
        name, colon, wanted = item.rpartition(":")
        if colon and wanted.isdecimal() and not name.endswith(":"):
            if int(wanted) != port:
                continue
            item = name
        item = item.lstrip("*").lstrip(".")
        if item and (host == item or host.endswith(f".{item}")):
            return True
    return False
