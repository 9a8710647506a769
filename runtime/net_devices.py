"""linux.netDevices: devices of the host's network namespace that go into the container's (runtime-spec 1.3).

A device keeps its permanent addresses of global scope, and is up when it has arrived; its routes are the operator's
affair. Refuses a device that is not there and a name that is taken before it moves any. Invariant: nothing is ever
moved back: when the namespace ends, the kernel gives physical devices to the host and destroys the others.
"""

from __future__ import annotations

import os

from runtime import sync
from runtime.errors import RuntimeFailure
from runtime.linux.process import CLONE_NEWNET, clone3, setns
from runtime.linux.record import Record
from runtime.linux.rtnetlink import Rtnetlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NoReturn

    from runtime.fields import Fields
    from runtime.namespaces import Namespace

_IFNAMSIZ = 16  # linux/if.h, with the NUL
# linux/if_addr.h: the flags of an address that are its owner's wish, and not its state.
_PERMANENT, _KEPT = 0x80, 0x02 | 0x100 | 0x200
_UNIVERSE = 0


class NetDevice(Record):
    """`name` on the host, `inside` in the container; a %d there is a number that the kernel chooses."""

    name: str
    inside: str


def parse(linux: Fields) -> tuple[NetDevice, ...]:
    """linux.netDevices. Raises FieldError."""
    fields = linux.object("netDevices")
    if fields is None:
        return ()
    found = []
    for name in fields.names():
        entry = fields.object(name)
        inside = entry.str("name") if entry is not None else ""
        for wanted in (name, inside or name):
            if not _is_name(wanted):
                raise fields.error(name, f'"{wanted:.40}" is no name of a network device')
        found.append(NetDevice(name, inside or name))
    return tuple(found)


def _is_name(name: str) -> bool:
    """As the kernel has it: dev_valid_name() in net/core/dev.c."""
    raw = name.encode("utf-8", "surrogateescape")
    return 0 < len(raw) < _IFNAMSIZ and name not in (".", "..") and not any(c in "/:" or c.isspace() for c in name)


def move_to(devices: Iterable[NetDevice], namespaces: Iterable[Namespace], pid: int) -> None:
    """Moves each into the container's network namespace: the one it is going to join, or that of its init. Raises
    RuntimeFailure; then those before it have moved."""
    joined = next((namespace.path for namespace in namespaces if namespace.kind == "network"), "")
    netns_fd = os.open(joined or f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _move_in_child(devices, netns_fd)
    finally:
        os.close(netns_fd)


def _move_in_child(devices: Iterable[NetDevice], netns_fd: int) -> None:
    mine, its = sync.Channel.pair()
    try:
        pid, pidfd = clone3(0)
        if pid == 0:
            mine.close()
            _main(devices, netns_fd, its)
        its.close()
        os.close(pidfd)
        try:
            mine.receive("Ready")
        finally:
            os.waitpid(pid, 0)
    finally:
        mine.close()
        its.close()


def _main(devices: Iterable[NetDevice], netns_fd: int, channel: sync.Channel) -> NoReturn:
    """In a process of its own, which has a socket on either side."""
    try:
        host = Rtnetlink()
        setns(netns_fd, CLONE_NEWNET)
        _move_all(devices, host, Rtnetlink(), netns_fd)
        channel.send("Ready")
    except BaseException as error:
        channel.fail(RuntimeFailure.of(error, step="network devices", code="invalid_argument"))
        os._exit(1)
    os._exit(0)


def _move_all(devices: Iterable[NetDevice], host: Rtnetlink, inside: Rtnetlink, netns_fd: int) -> None:
    here, there = host.links(), inside.links()
    for device in devices:
        where = f"linux.netDevices.{device.name}"
        if device.name not in here:
            raise RuntimeFailure(f"{where}: link not found for interface {device.name} on runtime namespace")
        if device.inside in there:
            raise RuntimeFailure(f"{where}: the container has a device {device.inside} already")
    for device in devices:
        _move(device, here[device.name], host, inside, netns_fd)


def _move(device: NetDevice, index: int, host: Rtnetlink, inside: Rtnetlink, netns_fd: int) -> None:
    what = f"linux.netDevices.{device.name}"
    addresses = host.addresses(index)  # before it goes down, which costs it those of IPv6
    host.set_up(index, False, f"{what}: set down")
    before = inside.links()
    host.move(index, device.inside, netns_fd, f"{what}: move to the container as {device.inside}")
    arrived = [number for name, number in inside.links().items() if name not in before]
    if len(arrived) != 1:
        raise RuntimeFailure(f"{what}: somebody else changes the container's devices: {arrived} are new")
    for address in addresses:
        if address.flags & _PERMANENT and address.scope == _UNIVERSE:
            inside.add_address(arrived[0], address, address.flags & _KEPT, f"{what}: give it its addresses")
    inside.set_up(arrived[0], True, f"{what}: set up")
