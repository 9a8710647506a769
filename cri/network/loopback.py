"""The loopback plugin, in-process: lo up in the pod, 127.0.0.1 and ::1 come with it.

Refuses nothing but a namespace that is gone. Invariant: an earlier plugin's result passes through unchanged.
"""

from __future__ import annotations

import ipaddress
import os

from cri.network.netlink import IFF_UP, Netlink, get_link, set_link
from cri.network.netns import inside, open_netns
from cri.network.values import Address, Allocation, Call, PluginError, Result, make_result


def add(call: Call, previous: Result | None) -> Result:
    """ADD. Raises PluginError."""
    if call.netns is None or (netns := open_netns(call.netns)) is None:
        raise PluginError(f"{call.pod.netns} is no pinned network namespace")
    try:
        inside(netns, _up)
    except OSError as error:
        raise PluginError(str(error)) from error
    finally:
        os.close(netns)
    if previous is not None:
        return previous
    interface = {"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": str(call.netns)}
    granted = Allocation((Address(ipaddress.ip_interface("127.0.0.1/8"), None),), (), {})
    return make_result(call.version, [interface], granted, 0)


def delete(call: Call, result: Result | None) -> None:
    """DEL: lo goes with its namespace."""


def check(call: Call, result: Result) -> None:
    """CHECK. Raises PluginError."""
    if call.netns is None or (netns := open_netns(call.netns)) is None:
        raise PluginError(f"{call.pod.netns} is no pinned network namespace")
    try:
        inside(netns, _look)
    except OSError as error:
        raise PluginError(str(error)) from error
    finally:
        os.close(netns)


def _look() -> None:
    with Netlink() as netlink:
        link = get_link(netlink, "lo")
    if link is None or not link.flags & IFF_UP:
        raise PluginError("lo of the pod is down")


def _up() -> None:
    with Netlink() as netlink:
        netlink.run([set_link(1, "lo", up=True)])
