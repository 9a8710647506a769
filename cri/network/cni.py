"""The pod network: cri.interfaces.Network over CNI 1.1, natively where ocid can and by programs where it cannot.

Refuses to forget: a pod's record is on disk before its first plugin is called and stays until every DEL was right.
Invariant: whatever `add` raises, DEL was called for all plugins with a deadline of its own (threats R11), also when the
caller was cancelled; whatever `delete` raises, the record is still there and the call may be made again.

    add     lock pod -> record -> plugin 1 ADD -> … -> plugin n ADD -> record with the result
            a failure: plugin n DEL -> … -> plugin 1 DEL -> record removed (kept when a DEL failed)
    delete  lock pod -> plugin n DEL -> … -> plugin 1 DEL -> record removed
    check   lock pod -> plugin 1 CHECK -> … -> plugin n CHECK, each with the chain's result
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from cri import trace
from cri.interfaces import InterfaceCounters, NetworkError, NetworkResult, PodNetwork
from cri.network import counters
from cri.network import netlink as nl
from cri.network import plan as planning
from cri.network.config import NetworkConfig
from cri.network.conflist import ConfigError, Conflist, is_name
from cri.network.external import Binaries
from cri.network.firewall import Firewall
from cri.network.lists import BuiltIn, parse_subnets
from cri.network.netns import Namespaces, open_netns
from cri.network.networks import Networks
from cri.network.plan import Plan, Tools
from cri.network.records import Record, Records
from cri.network.sysctl import set_sysctls
from cri.network.underway import UnderWay
from cri.network.values import Call, Cancel, PluginError, Result
from cri.threads import Threads
from runtime.linux.failpoint import failpoint

log = logging.getLogger(__name__)

_CALLS_AT_ONCE = 32
_RETIRING_AT_ONCE = 4
# After this the pod is up that took a spare namespace, and its first container most likely: the next one takes the
# processor from neither.
_CALM_S = 0.1
# How long a start waits for the plugins of pods that are gone: one that hangs, or waits for an agent that is a pod
# itself, must not keep the node from starting.
_LEFT_S = 2.0


class Cni:
    """cri.interfaces.Network. Made without a running loop and without a system call; `close` when done."""

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        self._records = Records(config.state_dir / "cni")
        self._firewall = Firewall(config.nft_table, self._records.path)
        self._binaries = Binaries(config.bin_dirs)
        self._tools = Tools(self._binaries, config.lease_dir, self._firewall, self._retire)
        built_in = BuiltIn(config.default_name, config.default_bridge, parse_subnets(config.default_subnets))
        self._networks = Networks(config.conf_dir, built_in, self._plan)
        self._namespaces = Namespaces(config.netns_dir or config.state_dir / "netns", config.pool_size)
        self._threads = Threads("network", _CALLS_AT_ONCE)
        self._retiring = ThreadPoolExecutor(_RETIRING_AT_ONCE, thread_name_prefix="network-retire")
        self._later = ThreadPoolExecutor(_RETIRING_AT_ONCE, thread_name_prefix="network-left")
        self._under_way = UnderWay(config.plugin_timeout_s)
        self._warming: asyncio.TimerHandle | None = None

    def interrupt(self) -> None:
        """Kills the plugin programs that run: the process is about to end. What they leave undone has its record."""
        self._under_way.interrupt()

    def close(self) -> None:
        """Lets go of threads and spare namespaces; pods keep their network."""
        self.interrupt()
        if self._warming is not None:
            self._warming.cancel()
        self._later.shutdown(wait=False, cancel_futures=True)
        self._threads.close()
        self._retiring.shutdown(wait=True)
        self._namespaces.close()

    # -------------------------------------------------------------------------------------------- network namespaces

    async def warm(self) -> None:
        """Makes the spare namespaces, so that the first pod finds one."""
        self._namespaces.warm()

    def _warm_soon(self) -> None:
        """After a namespace was taken, or could be."""
        if self._warming is None:
            self._warming = asyncio.get_running_loop().call_later(_CALM_S, self._warm_now)

    def _warm_now(self) -> None:
        self._warming = None
        self._namespaces.warm()

    def netns_path(self, pod_id: str) -> Path:
        return self._namespaces.path(pod_id)

    async def new_netns(self, pod_id: str, source: Path | None = None) -> Path:
        work = asyncio.ensure_future(self._threads.run(self._namespaces.create, pod_id, source))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await _settled(work)  # nobody will know of the pin: it goes again
            if not work.cancelled() and work.exception() is None:
                await _settled(asyncio.ensure_future(self._threads.run(self._namespaces.remove, work.result())))
            raise
        except (OSError, ValueError) as error:
            raise NetworkError(f"network namespace for pod {pod_id[:64]}: {error}") from error
        finally:
            self._warm_soon()

    async def remove_netns(self, path: Path) -> None:
        try:
            await self._threads.run(self._namespaces.remove, path)
        except (OSError, ValueError) as error:
            raise NetworkError(f"remove network namespace: {error}") from error

    # ------------------------------------------------------------------------------------------------------------ ADD

    async def add(self, pod: PodNetwork) -> NetworkResult:
        with self._under_way.cancellable() as cancel:
            work = asyncio.ensure_future(self._threads.run(self._add, pod, cancel))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                # The thread goes on (threats O1): tell it, and let it undo what it did before the caller's own undo.
                cancel.set()
                await _settled(work)
                if not work.cancelled() and work.exception() is None:
                    undo = asyncio.ensure_future(self._threads.run(self._delete, pod))
                    await _settled(undo)
                    if not undo.cancelled() and (failure := undo.exception()) is not None:
                        log.warning("%s; it is tried again when the pod is removed", failure)
                raise

    def _add(self, pod: PodNetwork, cancel: Cancel) -> NetworkResult:
        _check(pod)
        with self._under_way.one(pod.id):
            namespace = _identity(pod.netns)
            before = self._records.read(pod.id)
            if before is not None:
                same = before.namespace == namespace and before.pod.network == pod.network
                if before.result is not None and same:
                    return _answer(before.result)
                self._undo(before, "of an earlier attempt")
            conflist = self._networks.find(pod.network)
            try:
                plan = planning.negotiate(self._plan(conflist), self._tools)
                _look_up(plan)
                record = Record(pod, plan.conflist, self._config.interface, namespace, None)
                self._write(record)
            except PluginError as error:
                words = f"network {conflist.name}: add pod {_shown(pod)}: {error}"
                raise NetworkError(words, code=error.code) from error
            return self._run_chain(plan, record, cancel)

    def _run_chain(self, plan: Plan, record: Record, cancel: Cancel) -> NetworkResult:
        result: Result | None = None
        doing = "no plugin"
        try:
            failpoint("network.recorded")
            for step in plan.steps:
                doing = step.describe
                cancel.check()
                call = self._call(record, record.pod.netns, cancel)
                with trace.span(f"cni.add {step.describe}"):
                    result = step.add(call, result)
                failpoint("network.plugin.added")
            assert result is not None  # a list has at least one plugin
            cancel.check()
            doing = "sysctls"
            set_sysctls(record.pod)
            self._write(replace(record, result=result))
            return _answer(result)
        except Exception as error:  # a mistake of ours in the middle must not leak an address either
            what = f"network {plan.conflist.name}: {doing}: add pod {_shown(record.pod)}"
            failure = NetworkError(f"{what}: {_cause(error)}", code=_blame(error))
            try:
                self._undo(record, "after that failure")
            except NetworkError as second:
                failure.add_note(f"{second}; it is tried again when the pod is removed")
                failure.left = True
            raise failure from error

    def _undo(self, record: Record, when: str) -> None:
        """DEL of every plugin, and the record gone. Raises NetworkError; then the record is kept."""
        try:
            self._delete_chain(record)
        except PluginError as error:
            raise NetworkError(f"network {record.conflist.name}: {error} ({when})", code=error.code) from error
        self._forget(record.pod.id)

    # ------------------------------------------------------------------------------------------------------------ DEL

    async def delete(self, pod: PodNetwork) -> None:
        # A delete that has begun goes on when its caller is gone; there is nothing to undo.
        await self._threads.run(self._delete, pod)

    def _delete(self, pod: PodNetwork) -> None:
        if not is_name(pod.id):
            raise NetworkError(f"{pod.id[:64]!r} is not a pod's id")
        with self._under_way.one(pod.id):
            record = self._records.read(pod.id)
            if record is None:
                # After a reboot /run is empty, while leases on disk are not (threats O4).
                conflist = self._networks.find_or_none(pod.network)
                if conflist is None:
                    self._forget(pod.id)
                    return
                record = Record(pod, conflist, self._config.interface, (0, 0), None)
            try:
                self._delete_chain(record)
            except PluginError as error:
                raise NetworkError(f"network {record.conflist.name}: {error}", code=error.code) from error
            self._forget(pod.id)

    def _delete_chain(self, record: Record) -> None:
        """DEL in reverse. Stops at the first failure, as libcni does: an address is not given away while a later
        plugin's rule may still lead to it. Raises PluginError naming the plugin."""
        plan = self._plan(record.conflist)
        # Only the very namespace that ADD was for: another may have been pinned in its place.
        netns: Path | None = record.pod.netns
        namespace = _identity(record.pod.netns)
        if namespace == (0, 0) or (record.namespace != (0, 0) and namespace != record.namespace):
            netns = None
        for step in reversed(plan.steps):
            try:
                failpoint("network.plugin.delete")
                with trace.span(f"cni.delete {step.describe}"), self._under_way.cancellable() as cancel:
                    step.delete(self._call(record, netns, cancel), record.result)
            except Exception as error:
                words = f"{step.describe}: delete pod {_shown(record.pod)}: {_cause(error)}"
                raise PluginError(words, code=_blame(error)) from error

    def _call(self, record: Record, netns: Path | None, cancel: Cancel) -> Call:
        deadline = time.monotonic() + self._config.plugin_timeout_s
        conflist = record.conflist
        path = self._records.path(record.pod.id)
        return Call(record.pod, conflist.name, conflist.version, record.interface, netns, deadline, path, cancel)

    # ---------------------------------------------------------------------------------------------------------- CHECK

    async def check(self, pod: PodNetwork) -> str | None:
        return await self._threads.run(self._check, pod)

    def _check(self, pod: PodNetwork) -> str | None:
        doing = "no plugin"
        with self._under_way.one(pod.id):
            record = self._records.read(pod.id)
            if record is None or record.result is None:
                return f"pod {_shown(pod)}: nothing is recorded of its network"
            netns = record.pod.netns if _identity(record.pod.netns) == record.namespace else None
            try:
                for step in self._plan(record.conflist).steps:
                    doing = step.describe
                    with self._under_way.cancellable() as cancel:
                        step.check(self._call(record, netns, cancel), record.result)
            except Exception as error:
                return f"network {record.conflist.name}: {doing}: check pod {_shown(record.pod)}: {_cause(error)}"
        return None

    # --------------------------------------------------------------------------------------------------------- status

    async def counters(self, paths: Sequence[Path]) -> Mapping[Path, Sequence[InterfaceCounters]]:
        return await self._threads.run(counters.read, paths)

    async def status(self) -> str | None:
        return await self._threads.run(self._networks.reason)

    def problems(self) -> tuple[str, ...]:
        """A sentence for each file in the configuration directory that is not used, for `ocid doctor`."""
        return self._networks.problems()

    def networks(self) -> tuple[str, ...]:
        """The names of the configured networks, the default first."""
        return self._networks.names()

    # ------------------------------------------------------------------------------------------------------- recovery

    async def collect(self, valid: frozenset[str]) -> None:
        await self._threads.run(self._collect, valid)

    def _collect(self, valid: frozenset[str]) -> None:
        """Pods with records first, by their own plugins; then what has no record any more."""
        from cri.network import collect  # of use once in a daemon's life

        self._records.sweep()
        busy = self._under_way.pods
        left = [pod for pod in self._records.pods() if pod not in valid and pod not in busy]
        late = wait([self._later.submit(self._delete_left, pod) for pod in left], _LEFT_S).not_done
        if late:
            log.warning("the plugins of %d pods that are gone take longer; they are not waited for", len(late))
        kept = valid | frozenset(self._records.pods()) | self._under_way.pods
        for name in self._namespaces.names():
            if name not in kept:
                try:
                    self._namespaces.remove(self._namespaces.path(name))
                except OSError as error:
                    log.warning("remove network namespace: %s", error)
        records = [record for pod in self._records.pods() if (record := self._records.read(pod)) is not None]
        plans = [self._plan(conflist) for conflist in self._networks.all()]
        in_use = [self._plan(record.conflist) for record in records]
        collect.leftovers(kept, self._config, plans, in_use, records, self._firewall)

    def _delete_left(self, pod: str) -> None:
        namespace = self._namespaces.path(pod)
        try:
            self._delete(PodNetwork(pod, "", "", "", namespace))
            self._namespaces.remove(namespace)
        except (NetworkError, OSError) as error:
            log.warning("%s; it is tried again at the next start", error)

    # --------------------------------------------------------------------------------------------------------- helpers

    def _plan(self, conflist: Conflist) -> Plan:
        return planning.make(conflist, self._tools)

    def _write(self, record: Record) -> None:
        try:
            self._records.write(record)
        except OSError as error:
            raise PluginError(f"write the record: {error}") from error

    def _forget(self, pod: str) -> None:
        try:
            self._records.remove(pod)
        except OSError as error:
            raise NetworkError(f"remove the network record of pod {pod}: {error}") from error

    def _retire(self, index: int, name: str) -> None:
        """Removes a pod's interface that is down already, in the background: the kernel takes 40 ms for it."""

        def remove() -> None:
            try:
                with nl.Netlink() as netlink:
                    netlink.run([nl.delete_link(index, name)])
            except OSError as error:  # it goes with the pod's namespace, or at the next start
                log.warning("%s", error)

        self._retiring.submit(remove)


async def _settled(work: asyncio.Future[Any]) -> None:
    """Waits until `work` is done, however often the waiter is cancelled: every step in there has a deadline."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({work})


def _check(pod: PodNetwork) -> None:
    if not is_name(pod.id):
        raise NetworkError(f"{pod.id[:64]!r} is not a pod's id")
    if pod.network and not is_name(pod.network):
        raise NetworkError(f"{pod.network[:64]!r} is not a network's name", code="invalid_argument")
    if _identity(pod.netns) == (0, 0):
        raise NetworkError(f"pod {_shown(pod)}: {pod.netns} is no pinned network namespace")


def _identity(netns: Path) -> tuple[int, int]:
    """Device and inode of a pinned namespace; (0, 0) for none."""
    fd = open_netns(netns)
    if fd is None:
        return (0, 0)
    try:
        info = os.fstat(fd)
        return info.st_dev, info.st_ino
    finally:
        os.close(fd)


def _cause(error: Exception) -> str:
    """Its sentence; of an unexpected kind the kind as well."""
    known = isinstance(error, (PluginError, OSError, ConfigError))
    return str(error) if known else f"{type(error).__name__}: {error}"


def _blame(error: Exception) -> str:
    """NetworkError's code for what a plugin's step raised."""
    if isinstance(error, PluginError):
        return error.code
    return "failed_precondition" if isinstance(error, ConfigError) else "internal"


def _shown(pod: PodNetwork) -> str:
    return f"{pod.namespace}/{pod.name} ({pod.id[:12]})" if pod.name else pod.id[:12]


def _answer(result: Result) -> NetworkResult:
    """The pod's own addresses, each once."""
    ips = dict.fromkeys(str(address.interface.ip) for address in result.pod_addresses())
    return NetworkResult(tuple(ips), result.raw)


def _look_up(plan: Plan) -> None:
    """Finds every program before the first is called: with one missing there would be an ADD that no DEL could undo.
    Raises PluginError naming the plugin."""
    for program in plan.programs:
        try:
            program.find()
        except PluginError as error:
            kind = program.plugin.type
            what = f"plugin {kind}" if program.program == kind else f"plugin {kind}: ipam {program.program}"
            raise PluginError(f"{what}: {error}", code=error.code) from error
