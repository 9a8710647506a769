"""From a conflist to the steps that carry it out: which plugin runs in-process, which is a program.

Refuses a native plugin's bad setting by its path, before any pod is there. Invariant: the choice follows from the
configuration alone, so that DEL makes the same one as ADD did; whether a program exists is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from cri.network import bridge, bridge_check, host_local, loopback, portmap
from cri.network.conflist import VERSIONS, ConfigError, Conflist, Plugin, field
from cri.network.external import Binaries, External
from cri.network.firewall import Firewall
from cri.network.values import Allocation, Call, PluginError, Result, Step
from runtime.linux.dataclass import dataclass

_VERSION_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Tools:
    """What the plugins need of the daemon."""

    binaries: Binaries
    lease_dir: Path
    firewall: Firewall
    retire: Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class ExternalIpam:
    """An IPAM program under a native plugin: it gets that plugin's whole configuration, as CNI delegation has it."""

    program: External

    def allocate(self, call: Call) -> Allocation:
        try:
            return self.program.add(call, None).allocation()
        except PluginError as error:
            raise type(error)(f"ipam {self.program.program}: {error}") from error

    def release(self, call: Call, result: Result | None) -> None:
        try:
            self.program.delete(call, result)
        except PluginError as error:
            raise type(error)(f"ipam {self.program.program}: {error}") from error


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a list in ADD's order, and of the native ones what recovery looks at."""

    conflist: Conflist
    steps: tuple[Step, ...]
    programs: tuple[External, ...]
    bridges: tuple[bridge.Bridge, ...]
    allocators: tuple[host_local.HostLocal, ...]


def make(conflist: Conflist, tools: Tools) -> Plan:
    """Raises ConfigError naming the plugin and the field."""
    steps: list[Step] = []
    programs: list[External] = []
    bridges: list[bridge.Bridge] = []
    allocators: list[host_local.HostLocal] = []
    for number, plugin in enumerate(conflist.plugins):
        try:
            found = _native(conflist, plugin, tools)
        except ConfigError as error:
            raise ConfigError(f"{conflist.source}: plugins[{number}] ({plugin.type}): {error}") from None
        if found is None:
            program = External(tools.binaries, conflist, plugin, plugin.type, _refusal(plugin))
            programs.append(program)
            found = Step(f"plugin {plugin.type}", program.add, program.delete, program.check, external=True), None
        step, native = found
        steps.append(step)
        if native is not None:
            bridges.append(native)
            if isinstance(native.ipam, ExternalIpam):
                programs.append(native.ipam.program)
            elif isinstance(native.ipam, host_local.HostLocal):
                allocators.append(native.ipam)
    return Plan(conflist, tuple(steps), tuple(programs), tuple(bridges), tuple(allocators))


def _native(conflist: Conflist, plugin: Plugin, tools: Tools) -> tuple[Step, bridge.Bridge | None] | None:
    """The in-process form of a plugin, or None when the program is to be called."""
    describe = f"plugin {plugin.type} (native)"
    if plugin.type == "loopback":
        return Step(describe, loopback.add, loopback.delete, loopback.check), None
    if plugin.type == "portmap" and portmap.not_native(plugin.config) is None:
        # Without the capability a runtime hands no ports over, and the plugin has nothing to do.
        asked = "portMappings" in plugin.capabilities
        mapper = portmap.Portmap(tools.firewall, portmap.parse_settings(plugin.config), asked)
        return Step(describe, mapper.add, mapper.delete, mapper.check), None
    if plugin.type == "bridge" and bridge.not_native(plugin.config) is None:
        ipam = _ipam(conflist, plugin, tools)
        native = bridge.Bridge(bridge.parse_settings(plugin.config), ipam, tools.firewall, tools.retire)
        return Step(describe, native.add, native.delete, partial(bridge_check.check, native)), native
    return None


def _ipam(conflist: Conflist, plugin: Plugin, tools: Tools) -> bridge.Ipam | None:
    settings = field(plugin.config, "ipam", dict, {})
    kind = field(settings, "type", str, "", "ipam.")
    if not kind:
        return None
    if kind == "host-local":
        return host_local.HostLocal(conflist.name, host_local.parse_settings(settings), tools.lease_dir)
    return ExternalIpam(External(tools.binaries, conflist, plugin, kind))


def negotiate(plan: Plan, tools: Tools) -> Plan:
    """With a choice of versions (cniVersions) the newest one that every program speaks. Raises PluginError."""
    conflist = plan.conflist
    if len(conflist.versions) < 2 or not plan.programs:
        return plan
    common = set(conflist.versions)
    for program in plan.programs:
        said = program.versions(_VERSION_TIMEOUT_S)
        if not common.intersection(said):
            offered = ", ".join(conflist.versions)
            words = f"plugin {program.program} speaks CNI {', '.join(said)}; the list allows {offered}"
            raise PluginError(words, code="failed_precondition")
        common.intersection_update(said)
    chosen = tuple(version for version in VERSIONS if version in common)
    return plan if chosen == conflist.versions else make(replace(conflist, versions=chosen), tools)


def _refusal(plugin: Plugin) -> str:
    """Why a plugin that has a native form is not done in-process: "option vlan is not done in-process", or ""."""
    check = {"bridge": bridge.not_native, "portmap": portmap.not_native}.get(plugin.type)
    option = check(plugin.config) if check is not None else None
    return f"option {option} is not done in-process, and " if option else ""
