"""Which networks a pod may have: those of the configuration directory, the first by default, or the built-in one where
there is none; and whether the default one can be used just now.

Refuses to choose another network than the one that was asked for. Invariant: the built-in network is chosen once in a
daemon's life, so all of its pods are on one bridge.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cri.interfaces import NetworkError
from cri.network.conflist import ConfigError, Conflist
from cri.network.lists import BuiltIn, Lists
from cri.network.plan import Plan
from cri.network.values import PluginError

_STATUS_TIMEOUT_S = 5.0
_STATUS_AGE_S = 10.0


class Networks:
    """See the module. `plan` says how a list would be run; it raises ConfigError for one that cannot be."""

    def __init__(self, directory: Path, built_in: BuiltIn, plan: Callable[[Conflist], Plan]) -> None:
        self._directory = directory
        self._plan = plan
        self._lists = Lists(directory, plan)
        self._built_in = built_in
        self._built_in_list: Conflist | None = None
        self._status: tuple[float, Conflist, str | None] | None = None

    def find(self, name: str) -> Conflist:
        """The network `name`, or the default one for "". Raises NetworkError."""
        loaded = self._lists.load()
        for conflist in loaded.networks:
            if name in ("", conflist.name):
                return conflist
        said = f"; {'; '.join(loaded.problems)}" if loaded.problems else ""
        if not loaded.networks and not loaded.problems and name in ("", self._built_in.name):
            return self._choose()
        if name == self._built_in.name and not loaded.problems:
            return self._choose()
        wanted = f"network {name}" if name else "network configuration that can be used"
        raise NetworkError(f"no {wanted} in {self._directory}{said}", code="failed_precondition")

    def find_or_none(self, name: str) -> Conflist | None:
        try:
            return self.find(name)
        except NetworkError:
            return None

    def _choose(self) -> Conflist:
        if self._built_in_list is None:
            try:
                self._built_in_list = self._built_in.choose()
            except (ConfigError, OSError) as error:
                blame = "failed_precondition" if isinstance(error, ConfigError) else "internal"
                raise NetworkError(f"network {self._built_in.name}: {error}", code=blame) from error
        return self._built_in_list

    def all(self) -> list[Conflist]:
        """Every network that a pod may be on."""
        found = list(self._lists.load().networks)
        try:
            built_in = self._choose()
        except NetworkError:
            return found
        return found if any(conflist.name == built_in.name for conflist in found) else [*found, built_in]

    def problems(self) -> tuple[str, ...]:
        """A sentence for each file in the configuration directory that is not used."""
        return self._lists.load().problems

    def names(self) -> tuple[str, ...]:
        """The names of the configured networks, the default first."""
        return tuple(conflist.name for conflist in self._lists.load().networks) or (self._built_in.name,)

    # --------------------------------------------------------------------------------------------------------- status

    def reason(self) -> str | None:
        """Why the default network cannot be used; None when it can."""
        try:
            conflist = self.find("")
        except NetworkError as error:
            return str(error)
        plan = self._plan(conflist)
        for program in plan.programs:
            try:
                program.find()
            except PluginError as error:
                return f"network {conflist.name}: {error}"
        if conflist.version < "1.1.0" or not plan.programs:
            return None
        return self._asked(plan)

    def _asked(self, plan: Plan) -> str | None:
        """What the programs' STATUS says (CNI 1.1), asked at most every ten seconds: a kubelet asks us more often."""
        known = self._status
        if known is not None and known[1] == plan.conflist and time.monotonic() - known[0] < _STATUS_AGE_S:
            return known[2]
        reason = None
        for program in plan.programs:
            try:
                said = program.status(_STATUS_TIMEOUT_S)
            except PluginError as error:
                said = str(error)
            if said is not None:
                reason = f"network {plan.conflist.name}: plugin {program.program}: {said}"
                break
        self._status = (time.monotonic(), plan.conflist, reason)
        return reason
