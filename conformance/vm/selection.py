"""What `hack/vm` runs where nothing is chosen, and what of the runtime's tests it leaves to the other machine, and why.

Two sessions side by side, as the machine has two processors, the second in a network namespace of its own. Limits and
units are the first one's alone: systemd takes controllers from the cgroups at the top once no unit of its own needs
them. The others are where both then take as long. Invariant: each test_runtime_*.py is either
in `RUNTIME` or in `LEFT_OUT` (tests/unit/test_conformance_parts.py); a case that needs v1 asks for it (tests.support).
"""

from __future__ import annotations

from collections.abc import Iterator

_INTEGRATION = "tests/integration/test_runtime_{}.py"
_UNITS = ("machine", "cgroup2", "conformance", "systemd_scope", "user_systemd", "shim", "pods", "pod_limits", "kubelet")
_PODS = "tests/integration/test_cri_stats.py"  # figures and limits of pods, which it looks up for either version
_FIRST = (*(f"tests/vm/test_{name}.py" for name in (*_UNITS, "critest", "verity")), _PODS)
# What the kernel, its cgroups and its security module have a say in: all of a file, or the tests that are named.
RUNTIME: dict[str, tuple[str, ...]] = {
    "events": (),
    "exec": (
        "test_affinity_before_and_after_the_cgroup",
        "test_a_cgroup_below_the_containers",
        "test_a_cgroup_for_each_controller",
        "test_s19_a_cgroup_that_is_none_is_refused",
        "test_an_exec_goes_where_the_init_went_when_the_cgroup_takes_no_process",
        "test_exec_into_a_paused_container",
        "test_exec_into_a_created_container",
        "test_a_detached_exec_is_a_child_of_nobody_here_and_ends_with_the_container",
    ),
    "systemd": (),
    "threats": (),
    "unstarted": (),
    "verbs": (
        "test_a_container_goes_through_its_states",
        "test_exec_joins_everything",
        "test_pause_and_resume",
        "test_update_changes_limits_as_a_whole",
        "test_events",
        "test_spec_is_one_that_runs",
        "test_features_name_what_is_there",
        "test_bundles_whose_test_and_clean_up_fail_leave_nothing",
    ),
}
_SAME = "the same under any cgroups, and minutes under emulation"
LEFT_OUT = {
    "api": _SAME,
    "checkpoint": "with a criu that pretends; tests/vm has the real one",
    "criu_leftovers": _SAME,
    "cli": _SAME,
    "clone_vm": _SAME,
    "dump": "each case there goes on from a dump that was made there; making more of them takes minutes",
    "effects": _SAME,
    "failures": _SAME,
    "hooks": _SAME,
    "hostile": _SAME,
    "linux": _SAME,
    "mounts": _SAME,
    "mounts_hostile": _SAME,
    "mounts_ids": _SAME,
    "mounts_overlay": _SAME,
    "namespaces": _SAME,
    "net_devices": _SAME,
    "process": _SAME,
    "resources": "the files of cgroup v1; tests/vm has those of v2",
    "restored": _SAME,
    "rootless": "two minutes for one test of cgroups, which passes there",
    "seccomp": _SAME,
    "seccomp_notify": _SAME,
    "successor": _SAME,
    "update": "the files of cgroup v1; tests/vm has those of v2",
}


def runtime_tests() -> Iterator[str]:
    """`RUNTIME` as pytest is told it."""
    for name, chosen in RUNTIME.items():
        file = _INTEGRATION.format(name)
        yield from (f"{file}::{test}" for test in chosen) if chosen else (file,)


SESSIONS = (
    _FIRST,
    ("tests/vm", *(f"--ignore={file}" for file in _FIRST), *runtime_tests()),
)


def left_out() -> Iterator[str]:
    """A line for each reason."""
    for reason in dict.fromkeys(LEFT_OUT.values()):
        names = ",".join(name for name, why in LEFT_OUT.items() if why == reason)
        yield f"not run here: {_INTEGRATION.format(f'{{{names}}}')}: {reason}"
    names = ",".join(name for name, chosen in RUNTIME.items() if chosen)
    yield f"not all of {_INTEGRATION.format(f'{{{names}}}')}: the rest is {_SAME}"
