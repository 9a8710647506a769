"""ocid's one nftables table: masquerade by subnet, host ports by map. Pods share rules; only host ports are theirs.

Refuses to touch any other table. A masquerade rule belongs to a subnet and stays with its bridge: a rule a pod would
say the same a thousand times, and taking one out waits for an RCU grace period (8 to 16 ms here) under the lock that
every other pod's add needs. Invariant: each change is one atomic batch, made so that making it twice is making it once.

    table inet ocid {
        map ports4 {…}  map hostports4 {…}  map ports6 {…}  map hostports6 {…}      # comment: id, record
        chain prerouting, output { fib daddr type local jump ports }
        chain ports { dnat to … map @hostports4 ; dnat to … map @ports4 ; … }
        chain postrouting { ct status dnat ip saddr 127.0.0.0/8 masquerade ; ip saddr SUBNET jump masq_SUBNET ; … }
        chain masq_SUBNET { ip daddr SUBNET return ; ip daddr 224.0.0.0/4 return ; masquerade }
        chain hairpin_SUBNET { ct status dnat ip daddr SUBNET masquerade }
    }
"""

from __future__ import annotations

import errno
import ipaddress
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

from cri.network import nftables as nft
from cri.network.netlink import IPAddress, IPNetwork, NetlinkError
from cri.network.records import is_alive
from runtime.linux.dataclass import dataclass

_PREROUTING, _OUTPUT, _POSTROUTING = 0, 3, 4  # NF_INET_*
_DSTNAT, _SRCNAT = -100, 100
_PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132}
_LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
_LOOPBACK6 = ipaddress.ip_address("::1")
# How many entries of a map one message takes out: an attribute holds 64 KiB.
_ENTRIES = 256
_MULTICAST: Final[dict[int, IPNetwork]] = {
    4: ipaddress.ip_network("224.0.0.0/4"),
    6: ipaddress.ip_network("ff00::/8"),
}
Purpose = Literal["masq", "hairpin"]


@dataclass(frozen=True, slots=True)
class Forward:
    """A host port (of all addresses, or of `host_ip`) and the pod's address and port behind it."""

    protocol: str
    host_port: int
    host_ip: IPAddress | None
    pod_ip: IPAddress
    pod_port: int

    def describe(self) -> str:
        host = f"{self.host_ip} " if self.host_ip else ""
        return f"{host}port {self.host_port}/{self.protocol}"


class PortTakenError(Exception):
    """The host port leads to another pod, `owner`."""

    def __init__(self, forward: Forward, owner: str) -> None:
        super().__init__(f"host {forward.describe()} leads to {'pod ' + owner if owner else 'another pod'} already")
        self.owner = owner


def _subnet_chain(purpose: Purpose, subnet: IPNetwork) -> str:
    return f"{purpose}_{str(subnet).replace('.', '_').replace(':', '_').replace('/', '_')}"


def _in(subnet: IPNetwork, *, source: bool) -> bytes:
    return nft.in_subnet(subnet.version, source, subnet.network_address.packed, subnet.netmask.packed)


def _map_name(version: int, with_address: bool) -> str:
    return f"{'hostports' if with_address else 'ports'}{version}"


class Firewall:
    """The table `name`. Any number of threads may use it: the kernel's commit is the lock, and `_subnets` keeps a
    subnet from being added between the look and the commit of `keep_subnets`."""

    __slots__ = ("_record", "_subnets", "_table")

    def __init__(self, name: str, record: Callable[[str], Path]) -> None:
        """`record` is the path of a pod's record."""
        self._table = name
        self._record = record
        self._subnets = threading.Lock()

    # ------------------------------------------------------------------------------------------------- the frame

    def _frame(self) -> list[nft.Message]:
        """The table with its base chains and maps; rules of chains that are the same for everybody are replaced."""
        table = self._table
        messages = [
            nft.new_table(table),
            nft.new_nat_chain(table, "prerouting", _PREROUTING, _DSTNAT),
            nft.new_nat_chain(table, "output", _OUTPUT, _DSTNAT),
            nft.new_nat_chain(table, "postrouting", _POSTROUTING, _SRCNAT),
            nft.new_chain(table, "ports", exclusive=True),
        ]
        identity = 0
        for version, address in ((4, nft.TYPE_IPV4), (6, nft.TYPE_IPV6)):
            for with_address in (True, False):
                identity += 1
                key = [address, nft.TYPE_PROTO, nft.TYPE_PORT] if with_address else [nft.TYPE_PROTO, nft.TYPE_PORT]
                name, value = _map_name(version, with_address), [address, nft.TYPE_PORT]
                messages.append(nft.new_map(table, name, key, value, identity))
                rule = nft.translate_by_port(version, name, with_address=with_address)
                if version == 6 and not with_address:
                    # From ::1 no packet leaves the host (there is no route_localnet of IPv6): a client that tries it
                    # before 127.0.0.1 is to be refused at once, and who listens there keeps his port.
                    rule = nft.not_to(6, _LOOPBACK6.packed) + rule
                messages.append(nft.new_rule(table, "ports", nft.family(version), rule))
        for chain in ("prerouting", "output"):
            messages.append(nft.new_rule(table, chain, nft.is_local_destination(), nft.jump("ports")))
        # A connection to 127.0.0.1:PORT leaves for the pod with a source that the pod cannot answer.
        local = _in(_LOOPBACK, source=True)
        messages.append(nft.new_rule(table, "postrouting", nft.family(4), nft.is_translated(), local, nft.masquerade()))
        return messages

    def _ensure_frame(self) -> None:
        # `ports` comes last into being, and all of it at once: where it is, the frame is.
        if nft.list_chains(self._table, "ports"):
            return
        self._commit_once(self._frame())

    @staticmethod
    def _commit_once(messages: Sequence[nft.Message]) -> None:
        try:
            nft.commit(messages)
        except NetlinkError as error:
            if error.errno != errno.EEXIST:  # somebody was faster, with the same batch
                raise

    # ------------------------------------------------------------------------------------------------ the subnets

    def ensure_subnet(self, purpose: Purpose, subnet: IPNetwork) -> None:
        """`masq`: what leaves `subnet` takes the host's address. `hairpin`: so does a pod's connection to a host port
        that leads back into its own subnet. A look-up when it is there already; it also mends a flushed ruleset."""
        chain = _subnet_chain(purpose, subnet)
        if nft.list_chains(self._table, chain):
            return
        self._ensure_frame()
        with self._subnets:
            rules = self._subnet_rules(purpose, subnet)
            self._commit_once([nft.new_chain(self._table, chain, exclusive=True), *rules])

    def _subnet_rules(self, purpose: Purpose, subnet: IPNetwork) -> list[nft.Message]:
        table, chain = self._table, _subnet_chain(purpose, subnet)
        inside = _in(subnet, source=False)
        if purpose == "masq":
            rules = [(inside, nft.leave()), (_in(_MULTICAST[subnet.version], source=False), nft.leave())]
            rules.append((b"", nft.masquerade()))
        else:
            rules = [(nft.is_translated() + inside, nft.masquerade())]
        family = nft.family(subnet.version)  # so that nft(8) prints the rules as addresses
        messages = [nft.new_rule(table, chain, family, condition, verdict) for condition, verdict in rules]
        messages.append(self._subnet_jump(purpose, subnet))
        return messages

    def _subnet_jump(self, purpose: Purpose, subnet: IPNetwork) -> nft.Message:
        source, target = _in(subnet, source=True), nft.jump(_subnet_chain(purpose, subnet))
        return nft.new_rule(self._table, "postrouting", nft.family(subnet.version), source, target)

    def keep_subnets(self, wanted: Iterable[tuple[Purpose, IPNetwork]]) -> None:
        """Removes the rules of all subnets but those `wanted`, in one batch. Costs a grace period if there are any."""
        with self._subnets:
            self._keep_subnets(wanted)

    def _keep_subnets(self, wanted: Iterable[tuple[Purpose, IPNetwork]]) -> None:
        there = {chain for chain in nft.list_chains(self._table) if chain.startswith(("masq_", "hairpin_"))}
        kept = {_subnet_chain(*item): item for item in wanted if _subnet_chain(*item) in there}
        gone = sorted(there - kept.keys())
        if not gone:
            return
        local = _in(_LOOPBACK, source=True)
        messages = [
            nft.flush_chain(self._table, "postrouting"),
            nft.new_rule(self._table, "postrouting", nft.family(4), nft.is_translated(), local, nft.masquerade()),
            *(self._subnet_jump(*item) for item in kept.values()),
        ]
        for chain in gone:
            messages += [nft.flush_chain(self._table, chain), nft.delete_chain(self._table, chain)]
        nft.commit(messages)

    # --------------------------------------------------------------------------------------------------- the ports

    def add_forwards(self, owner: str, forwards: Sequence[Forward]) -> None:
        """All of them or none. What `owner` has already is kept. Raises PortTakenError."""
        self._ensure_frame()
        missing = []
        for forward in forwards:
            name, element = _element(forward, f"{owner} {self._record(owner)}")
            there = list(nft.list_elements(self._table, name, element))
            if there and (_pod(there[0]), there[0].value) != (owner, element.value):
                raise PortTakenError(forward, _pod(there[0]))
            if not there:
                missing.append((name, element))
        if not missing:
            return
        try:
            nft.commit([nft.add_elements(self._table, name, [element]) for name, element in missing])
        except NetlinkError as error:
            if error.errno == errno.EEXIST:
                raise PortTakenError(forwards[0], "") from error
            raise

    def remove_forwards(self, owner: str) -> list[Forward]:
        """Removes every forward of `owner` and returns them. None: nothing happens."""
        return self._remove(lambda found: _pod(found) == owner)

    def keep_forwards(self, owners: frozenset[str]) -> list[Forward]:
        """Removes the forwards of all but these owners and another ocid's pods, and returns them."""
        return self._remove(lambda found: _pod(found) not in owners and not is_alive(_record(found)))

    def _remove(self, condition: Callable[[nft.Element], bool]) -> list[Forward]:
        messages, removed = [], []
        for version in (4, 6):
            for with_address in (True, False):
                name = _map_name(version, with_address)
                found = [item for item in nft.list_elements(self._table, name) if condition(item)]
                if found:
                    parts = (found[start : start + _ENTRIES] for start in range(0, len(found), _ENTRIES))
                    messages += [nft.delete_elements(self._table, name, part) for part in parts]
                    removed += [_forward(version, with_address, item) for item in found]
        if messages:
            nft.commit(messages)
        return removed

    def remove(self) -> None:
        """The whole table; a missing one is a removed one."""
        try:
            nft.commit([nft.delete_table(self._table)])
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise


def _pod(element: nft.Element) -> str:
    return element.owner.partition(" ")[0]


def _record(element: nft.Element) -> Path | None:
    path = element.owner.partition(" ")[2]
    return Path(path) if path else None


def _element(forward: Forward, owner: str) -> tuple[str, nft.Element]:
    key = [bytes([_PROTOCOLS[forward.protocol]]), forward.host_port.to_bytes(2, "big")]
    if forward.host_ip is not None:
        key.insert(0, forward.host_ip.packed)
    value = nft.concatenation(forward.pod_ip.packed, forward.pod_port.to_bytes(2, "big"))
    name = _map_name(forward.pod_ip.version, forward.host_ip is not None)
    return name, nft.Element(nft.concatenation(*key), value, owner)


def _forward(version: int, with_address: bool, element: nft.Element) -> Forward:
    size = 4 if version == 4 else 16
    names = {number: name for name, number in _PROTOCOLS.items()}
    host_ip = ipaddress.ip_address(element.key[:size]) if with_address else None
    rest = element.key[size:] if with_address else element.key
    return Forward(
        protocol=names.get(rest[0], str(rest[0])),
        host_port=int.from_bytes(rest[4:6], "big"),
        host_ip=host_ip,
        pod_ip=ipaddress.ip_address(element.value[:size]),
        pod_port=int.from_bytes(element.value[size : size + 2], "big"),
    )
