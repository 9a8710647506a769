"""What starting costs: the modules that each entry point imports, and a generous limit on their processor time.

The module lists are the budget that no machine can blur; the times, in units of tests.costs, only catch what is badly
wrong.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The probe itself imports nothing more than `time`.
PROBE = """
import sys, time
sys.path.insert(0, {root!r})
before = set(sys.modules)
began = time.process_time()
import {module}
took, names = time.process_time() - began, set(sys.modules) - before
from tests.costs import unit
print(took / min(unit() for _ in range(20)), *names)
"""
# Each of these costs more to import than ocirun needs to start a process.
COSTLY = frozenset(
    ("argparse", "asyncio", "dataclasses", "inspect", "logging", "pathlib", "re", "subprocess", "typing")
)
# These for a file that few nodes have, for a stream's URL, for a profile.
ONCE = frozenset(("importlib.resources", "secrets", "tomllib"))
# These are for single subcommands, for tracing, or for nobody.
HEAVY = frozenset(
    ("aiohttp", "cryptography", "grpc", "opentelemetry", "prometheus_client", "pyroute2", "rich", "yaml", "zstandard")
)


@functools.cache
def _imports(module: str, *flags: str, times: int = 1) -> tuple[float, frozenset[str]]:
    """The shortest of so many starts, and what each imports."""
    # The venv's interpreter with -S has no site-packages at all: what runtime imports, it must find without.
    command = [sys.executable, *flags, "-c", PROBE.format(root=str(ROOT), module=module)]
    shortest, names = 1e9, frozenset[str]()
    for _ in range(times):
        took, *found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        shortest, names = min(shortest, float(took)), frozenset(found)
    return shortest, names


def _packages(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(("module", "limit"), [("runtime.cli", 150), ("runtime.shim.zygote", 800)])
def test_the_runtime_starts_with_little(module: str, limit: int) -> None:
    took, names = _imports(module, "-I", "-S", times=3)
    found = _packages(names) & COSTLY
    assert not found, f"{module} imports {sorted(found)} at its start"
    assert took < limit, f"importing {module} takes {took:.0f} units"


def test_a_worker_that_unpacks_starts_with_less() -> None:
    names = _imports("snapshotter.worker", "-I", "-S")[1]
    refused = COSTLY | {"collections", "ctypes", "enum", "hashlib", "json", "signal", "socket", "threading"}
    assert not names & refused, f"the worker imports {sorted(names & refused)} at its start"


@pytest.mark.parametrize("module", ["cri.cli.main", "cri.cli.ps", "cri.cli.stop"])
def test_the_command_line_waits_for_nothing_heavy(module: str) -> None:
    names = _packages(_imports(module, "-I")[1])
    refused = HEAVY - ({"grpc"} if module != "cri.cli.main" else set())
    assert not names & refused, f"{module} imports {sorted(names & refused)} at its start"


@pytest.mark.parametrize("module", ["cri.cli.main", "cri.cli.ps", "cri.cli.run", "cri.daemon"])
def test_what_few_calls_need_is_imported_by_those(module: str) -> None:
    found = _imports(module, "-I")[1] & ONCE
    assert not found, f"{module} imports {sorted(found)} at its start"


def test_no_command_that_starts_is_held_up_by_the_collector() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import gc; from cri.cli.main import OBJECTS_OF_A_START; "
        "gc.collect(); gc.set_threshold(OBJECTS_OF_A_START); before = gc.get_stats()[0]['collections']; "
        "import cri.cli.ps, cri.daemon; print(gc.get_stats()[0]['collections'] - before)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_the_daemon_is_not_heavier_than_it_must_be() -> None:
    names = _packages(_imports("cri.daemon", "-I")[1])
    allowed = {"grpc", "aiohttp", "zstandard"}
    assert not names & (HEAVY - allowed), f"cri.daemon imports {sorted(names & (HEAVY - allowed))} at its start"
