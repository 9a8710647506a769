"""What a killed node left of pods that nobody knows any more: leases, host ports, interfaces, subnet rules.

Refuses what belongs to others on the machine: of another ocid (with a root and state of its own) the pod's record is
there, whose path leases, interfaces and host ports carry; of another runtime libcni keeps the result. Invariant: what
belongs to a pod in `kept` is not touched; a failure is reported and the rest goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cri.network import conntrack
from cri.network.conflist import Conflist
from cri.network.firewall import Firewall, Purpose
from cri.network.host_local import HostLocal
from cri.network.netlink import IPNetwork, Netlink
from cri.network.plan import Plan
from cri.network.records import Record, is_alive
from cri.network.routes import list_addresses
from cri.network.values import PluginError

if TYPE_CHECKING:
    from cri.network.config import NetworkConfig

log = logging.getLogger(__name__)

_LOCK_S = 10.0
_GC_TIMEOUT_S = 5.0  # the node's start waits for it, since nobody may be added meanwhile (CNI 1.1, section 2, GC)


def leftovers(
    kept: frozenset[str],
    config: NetworkConfig,
    plans: Sequence[Plan],
    in_use: Sequence[Plan],
    records: Sequence[Record],
    firewall: Firewall,
) -> None:
    """Removes them. `plans` are the configured networks, `in_use` those of `records`: the pods there are."""
    for plan in (*plans, *in_use):
        for allocator in plan.allocators:
            _try("release leases", partial(release, allocator, kept))
        for bridge in plan.bridges:
            keep = frozenset((pod, config.interface) for pod in kept)
            _try("remove interfaces", partial(bridge.sweep, keep))
    _try("remove host ports", partial(_ports, firewall, kept))
    _try("remove subnet rules", lambda: firewall.keep_subnets(_subnets([*plans, *in_use], records)))
    for plan in plans:
        _programs(plan, kept, config.interface)


def _try(what: str, function: Callable[[], object]) -> None:
    try:
        function()
    except (OSError, PluginError) as error:
        log.warning("%s of pods that are gone: %s", what, error)


def release(allocator: HostLocal, kept: frozenset[str]) -> None:
    """Leases of containers outside `kept`. Raises PluginError, OSError."""
    store = allocator.store
    if not store.exists():
        return
    with store.locked(_LOCK_S):
        store.sweep()
        for lease in store.leases():
            if lease.container in kept or is_alive(store.record(lease)):
                continue
            if not _is_foreign(allocator, lease.container, lease.interface):
                store.remove(lease)


def _is_foreign(allocator: HostLocal, container: str, interface: str) -> bool:
    """libcni caches each ADD's result as RESULTS/NETWORK-CONTAINER-IFNAME; ocid does not."""
    results = Path(allocator.default_directory).parent / "results"
    return "/" not in container and (results / f"{allocator.network}-{container}-{interface}").exists()


def _ports(firewall: Firewall, kept: frozenset[str]) -> None:
    removed = firewall.keep_forwards(kept)
    udp = frozenset(forward.host_port for forward in removed if forward.protocol == "udp")
    if udp:
        conntrack.forget_udp(udp)


def _subnets(plans: Sequence[Plan], records: Sequence[Record]) -> set[tuple[Purpose, IPNetwork]]:
    """The subnets that a configured network hands out, those that pods have addresses of, and all that the host has
    an address in: a rule lives as long as its bridge, whoever's that is."""
    networks = {
        item.subnet for plan in plans for ipam in plan.allocators for ranges in ipam.settings.sets for item in ranges
    }
    for record in records:
        if record.result is not None:
            networks |= {address.interface.network for address in record.result.addresses}
    with Netlink() as netlink:
        networks |= {address.network for address in list_addresses(netlink)}
    purposes: tuple[Purpose, Purpose] = ("masq", "hairpin")
    return {(purpose, network) for network in networks for purpose in purposes}


def _programs(plan: Plan, kept: frozenset[str], interface: str) -> None:
    """GC of CNI 1.1, for lists that allow it."""
    conflist: Conflist = plan.conflist
    if conflist.version < "1.1.0" or conflist.disable_gc:
        return
    valid = [(pod, interface) for pod in sorted(kept)]
    for program in plan.programs:
        try:
            program.collect(valid, _GC_TIMEOUT_S)
        except PluginError as error:
            log.warning("network %s: plugin %s: collect: %s", conflist.name, program.program, error)
