"""The cgroup of a container as a unit of systemd's: made, limited and taken away over D-Bus.

    ocirun                                    systemd
      │ clone3: the init waits for its first Go
      │── StartTransientUnit(scope, PIDs=init, limits) ──►│ makes the cgroup, moves the init there
      │◄──────────────────────────── JobRemoved(done) ────│
      │ what systemd has no words for, into the cgroup itself (Delegate=)
      │ Go
      ⋮
      │── StopUnit, ResetFailedUnit ─────────────────────►│

A scope needs a process to begin with, so it cannot be made before the init as other cgroups are: `create` checks and
remembers, `adopt` makes. An ordinary user's scope is made by the systemd that is his (runtime/cgroups/buses.py), within
what that was given (Delegate= of user@.service); he may set no rules for devices, and needs none. Refuses machines
without systemd and those with v1 controllers, where systemd would have one half of the limits and nobody the other.
Invariant: no call waits longer than REPLY_S, no job longer
than _JOB_S (threats O36); what systemd knows of the limits and what is in force agree, so its daemon-reload changes
nothing: but for a quota of a fraction of a percent, which systemd has no digits for and gets rounded up.
"""

from __future__ import annotations

import os

from runtime.cgroups import devices, limits, tree
from runtime.cgroups.buses import REPLY_S, connect_system, connect_user, is_users
from runtime.cgroups.dbus import BusError, Variant
from runtime.cgroups.hierarchy import Place, below_service, clean, detect
from runtime.cgroups.killer import SIGKILL
from runtime.cgroups.manager import PATIENCE_S, UNIT, Gate, Manager
from runtime.cgroups.plan import Now
from runtime.cgroups.scope import USER_SLICE, annotated, properties, scope_for, start_properties
from runtime.errors import RuntimeFailure
from runtime.linux.failpoint import failpoint

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.cgroups.dbus import Bus
    from runtime.cgroups.hierarchy import Hierarchy
    from runtime.cgroups.scope import Properties, Scope
    from runtime.resources import Resources

_NAME = "org.freedesktop.systemd1"
_PATH = "/org/freedesktop/systemd1"
_MANAGER = f"{_NAME}.Manager"
_BUS = "org.freedesktop.DBus"
_JOB_S = 30.0
# After a bus that did not answer: cleaning up asks once more, but does not wait as long again.
_IMPATIENT_S = 1.0


def systemd_manager(
    cgroups_path: str, container_id: str, annotations: Iterable[tuple[str, str]], rootless: bool | None = None
) -> SystemdManager:
    """The manager of a new container: linux.cgroupsPath is "slice:prefix:name", or "". `rootless` says whether it is
    made by a user's systemd; None: by whose rights this is. Raises RuntimeFailure."""
    if not os.path.isdir("/run/systemd/system"):
        raise RuntimeFailure(
            "systemd not running on this host, cannot use systemd cgroups manager",
            step="cgroup",
            hint="without --systemd-cgroup cgroups are made directly",
            code="failed_precondition",
        )
    hierarchy = _hierarchy()
    if is_users(rootless):
        scope = scope_for(cgroups_path, container_id, USER_SLICE)
        scope = scope.changed(below=_cgroup_of_users_systemd())
    else:
        scope = scope_for(cgroups_path, container_id)
    place = Place(hierarchy, clean(scope.relative, "linux.cgroupsPath"))
    manager = SystemdManager((place,), scope.unit)
    manager.scope = scope
    manager.container_id = container_id
    manager.extra = annotated(annotations)
    return manager


def _cgroup_of_users_systemd() -> str:
    try:
        with connect_user(REPLY_S) as bus:
            (found,) = bus.call(_NAME, _PATH, f"{_BUS}.Properties", "Get", "ss", _MANAGER, "ControlGroup")
    except BusError as error:
        raise RuntimeFailure(
            f"--systemd-cgroup: no systemd answers on the user's bus: {error.message}",
            step="cgroup",
            hint="systemctl --user status",
            code="failed_precondition",
        ) from None
    return str(found.value) if isinstance(found, Variant) else ""


def _hierarchy() -> Hierarchy:
    found = detect()
    if any(hierarchy.version == 1 and not _is_systemds_own(hierarchy) for hierarchy in found):
        raise RuntimeFailure(
            "--systemd-cgroup: this machine has cgroup v1 controllers, and the systemd driver is for v2 alone",
            step="cgroup",
            hint="boot with systemd.unified_cgroup_hierarchy=1, or leave the flag out",
            code="failed_precondition",
        )
    return found[-1]


def _is_systemds_own(hierarchy: Hierarchy) -> bool:
    return all(name.startswith("name=") for name in hierarchy.controllers)


class SystemdManager(Manager):
    """See the module. One that was found again by its paths knows its unit, and has no scope; that may be the slice of
    a pod, of which only the limits are ours to say."""

    __slots__ = (
        *("_foreign", "_impatient", "_interface", "_of_user", "_pending", "_unit"),
        *("container_id", "extra", "scope"),
    )
    adopts = True

    def __init__(self, places: tuple[Place, ...], unit: str, verify: tree.Verify = tree.verify_cgroup) -> None:
        self._of_user = below_service(places[0].relative)
        super().__init__(places, verify, rootless=self._of_user)
        self._unit = unit
        self._interface = f"{_NAME}.{'Slice' if unit.endswith('.slice') else 'Scope'}"
        self._pending: Resources | None = None
        self._foreign = False  # somebody else has a unit of that name
        self._impatient = False
        self.scope: Scope | None = None
        self.container_id = ""
        self.extra: Properties = []

    def note(self) -> dict[str, str]:
        return {**self.paths(), UNIT: self._unit}

    # -------------------------------------------------------------------------------------------- create and destroy

    def create(self, resources: Resources) -> None:
        """Refuses what cannot be; makes nothing yet. Raises RuntimeFailure."""
        limits.plans(self, resources, Now())
        properties(resources, Now())
        devices.policy(resources.devices or ())
        if held := self.pids():
            raise RuntimeFailure(
                f"make unit {self._unit}: its cgroup holds process {', '.join(map(str, held[:10]))} already",
                step="cgroup",
                hint="linux.cgroupsPath must be this container's alone",
                code="failed_precondition",
            )
        self._pending = resources

    def gate(self) -> Gate:
        """Before `adopt` there is nothing to enter: the init is born where its parent is, and systemd moves it."""
        return Gate(-1, []) if self._pending is not None else super().gate()

    def adopt(self, pid: int) -> None:
        """Makes the unit around `pid`, with all limits. Raises RuntimeFailure."""
        resources, scope = self._pending, self.scope
        assert resources is not None and scope is not None  # create looked
        wanted = start_properties(scope, pid, self.container_id, self.extra) + properties(resources, Now())
        try:
            with self._bus() as bus:
                self._listen(bus)
                self._start(bus, wanted)
        except RuntimeFailure as failure:
            self._impatient = failure.code == "unavailable"
            raise
        self._pending = None
        failpoint("cgroup.made")
        # Those that systemd does not know, so that it neither turns them on nor off.
        limits.give(self, ["hugetlb", *(["rdma"] if resources.rdma else [])])
        super().set(resources.changed(devices=resources.devices or ()))
        failpoint("cgroup.limited")

    def _start(self, bus: Bus, wanted: Properties) -> None:
        signature, *values = "ssa(sv)a(sa(sv))", self._unit, "replace", wanted, ()
        try:
            answer = self._ask(bus, "StartTransientUnit", signature, *values)
        except BusError as error:
            if error.name != f"{_NAME}.UnitExists":
                raise self._failed("start", error) from None
            # Of a container that ended badly and was never deleted: its name is given up, and asked for again.
            self._reset(bus)
            try:
                answer = self._ask(bus, "StartTransientUnit", signature, *values)
            except BusError as again:
                self._foreign = again.name == f"{_NAME}.UnitExists"
                raise self._failed("start", again) from None
        self._finish(bus, "start", answer)

    def _finish(self, bus: Bus, verb: str, answer: tuple[object, ...]) -> None:
        """Waits for the end of a job."""
        job = answer[0]
        what = f"the end of the job to {verb} {self._unit}"
        body = bus.signal("JobRemoved", lambda body: body[1:2] == (job,), _JOB_S, what)
        result = body[3] if len(body) == 4 else "unknown"
        if result != "done":
            self._reset(bus)
            raise RuntimeFailure(
                f"{verb} unit {self._unit}: systemd's job ended as {result!r}",
                step="cgroup",
                hint=f"journalctl -u {self._unit}",
            )

    def attach(self, pid: int, below: str) -> None:
        """Has systemd move a process into the unit, or into a cgroup of the container's `below` it. Raises
        RuntimeFailure."""
        try:
            with self._bus() as bus:
                self._ask(bus, "AttachProcessesToUnit", "ssau", self._unit, below, [pid])
        except BusError as error:
            raise self._failed(f"move {pid} into", error) from None

    def destroy(self, deadline_s: float = PATIENCE_S) -> None:
        """Stops the unit, and removes what of its cgroup is there still. No such unit is a stopped one, and one of
        that name elsewhere is somebody else's."""
        if self._foreign:
            return
        try:
            with self._bus() as bus:
                self._listen(bus)
                try:
                    if self._get(bus, "ControlGroup") == f"/{self.places[0].relative}":
                        self._finish(bus, "stop", self._ask(bus, "StopUnit", "ss", self._unit, "replace"))
                    self._reset(bus)
                except BusError as error:
                    if error.name != f"{_NAME}.NoSuchUnit":
                        raise self._failed("stop", error) from None
        finally:
            super().destroy(deadline_s)

    def kill(self, number: int = SIGKILL, deadline_s: float = PATIENCE_S) -> bool:
        return self._foreign or super().kill(number, deadline_s)

    def _reset(self, bus: Bus) -> None:
        """Forgets a unit that has failed; any other needs no forgetting."""
        try:
            self._ask(bus, "ResetFailedUnit", "s", self._unit)
        except BusError:
            pass

    # -------------------------------------------------------------------------------------------------------- limits

    def set(self, resources: Resources) -> None:
        """First systemd, which would put its own view into force at its next reload; then the cgroup, exactly. When
        that fails systemd is given back what it had."""
        now = limits.now(self)
        wanted = properties(resources, now)
        limits.plans(self, resources, now)
        limits.check_usage(self, resources)
        if not wanted:
            super().set(resources)
            return
        with self._bus() as bus:
            before = self._known(bus)
            self._properties(bus, wanted)
            try:
                super().set(resources)
            except BaseException as error:
                try:
                    self._properties(bus, [(name, before[name]) for name, _ in wanted if name in before])
                except RuntimeFailure as second:
                    error.add_note(f"giving systemd back what it had failed too: {second}")
                raise

    def _get(self, bus: Bus, name: str) -> object:
        """A property of the unit. Raises BusError."""
        (path,) = self._ask(bus, "GetUnit", "s", self._unit)
        (found,) = bus.call(_NAME, str(path), f"{_BUS}.Properties", "Get", "ss", self._interface, name)
        return found.value if isinstance(found, Variant) else None

    def _known(self, bus: Bus) -> dict[str, Variant]:
        """All properties of the unit."""
        try:
            (path,) = self._ask(bus, "GetUnit", "s", self._unit)
            (found,) = bus.call(_NAME, str(path), f"{_BUS}.Properties", "GetAll", "s", self._interface)
        except BusError as error:
            raise self._failed("update", error) from None
        return found if isinstance(found, dict) else {}

    def _properties(self, bus: Bus, wanted: Properties) -> None:
        try:
            # Runtime: these are a container's, and a container does not outlive the machine.
            self._ask(bus, "SetUnitProperties", "sba(sv)", self._unit, True, wanted)
            # It answers first and writes to the cgroup afterwards, before it looks at the next message: once that is
            # answered too, nothing of it comes after our own writes.
            bus.call(_NAME, _PATH, f"{_BUS}.Peer", "Ping")
        except BusError as error:
            raise self._failed("update", error) from None

    # ----------------------------------------------------------------------------------------------------------- bus

    def _bus(self) -> Bus:
        connected = connect_user if self._of_user else connect_system
        return connected(_IMPATIENT_S if self._impatient else REPLY_S)

    def _listen(self, bus: Bus) -> None:
        """From before a job is asked for: it may have ended before the answer is read."""
        bus.subscribe(_NAME, _MANAGER, "JobRemoved")
        self._ask(bus, "Subscribe")

    def _ask(self, bus: Bus, member: str, signature: str = "", *values: object) -> tuple[object, ...]:
        return bus.call(_NAME, _PATH, _MANAGER, member, signature, *values)

    def _failed(self, verb: str, error: BusError) -> RuntimeFailure:
        name = error.name.removeprefix(f"{_NAME}.")
        return RuntimeFailure(f"{verb} unit {self._unit}: systemd refuses: {error.message} ({name})", step="cgroup")
