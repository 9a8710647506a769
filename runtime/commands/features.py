"""`ocirun features`: what this runtime can do, as runtime-spec's features.md has it.

Refuses to promise: every list comes from the table that the parser of config.json reads by, and what is one word here
is held against the parser by tests/unit/test_features.py. Invariant: the document says what the runtime can do, on any
machine; only seccomp's `enabled` and `supportedFlags` are about this one.
"""

from __future__ import annotations

import os

from runtime import mounts
from runtime.capabilities import CAPABILITIES
from runtime.cli import COMMANDS, VERSION
from runtime.namespaces import FLAGS as NAMESPACES
from runtime.options import UsageError
from runtime.spec_hooks import HOOKS
from runtime.state import SPEC_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cli import Context
    from runtime.options import Values

FLAGS: dict[str, tuple[()]] = {"features": ()}
WORDS = {"features": ""}


def run(_context: Context, _name: str, values: Values) -> int:
    import json

    if values.words:
        raise UsageError("takes no container")
    data = (json.dumps(features(), indent=4) + "\n").encode()
    while data:
        data = data[os.write(1, data) :]
    return 0


def features() -> dict[str, object]:
    """The features object of runtime-spec."""
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": SPEC_VERSION,
        "hooks": list(HOOKS.values()),
        "mountOptions": mounts.known_options(),
        "linux": {
            "namespaces": sorted(NAMESPACES),
            "capabilities": list(CAPABILITIES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": _seccomp(),
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "memoryPolicy": _memory_policy(),
            "intelRdt": {"enabled": True, "schemata": True, "monitoring": True},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": True},
        },
        "annotations": _annotations(),
        # No other annotation of a config.json changes what this runtime does (threats R7): runtime/reaper.py has the
        # first; the others do with --systemd-cgroup only, and only those in the list of runtime/cgroups/scope.py.
        "potentiallyUnsafeConfigAnnotations": ["ocid.init", "org.systemd.property."],
    }


def _seccomp() -> dict[str, object]:
    from runtime import seccomp
    from runtime.linux.seccomp import has_flag

    supported = [name for name, flag in seccomp.FLAGS.items() if not flag or has_flag(flag)]
    return {
        "enabled": bool(_libseccomp()),
        "actions": sorted(seccomp.ACTIONS),
        "operators": sorted(seccomp.OPERATORS),
        "archs": sorted(f"SCMP_ARCH_{name}" for name in seccomp.ARCHITECTURES),
        "knownFlags": sorted(seccomp.FLAGS),
        "supportedFlags": sorted(supported),
    }


def _libseccomp() -> str:
    """The version of the library that compiles profiles; "" when it is not installed."""
    from runtime.linux import libseccomp
    from runtime.linux.libc import KernelError

    try:
        return libseccomp.version()
    except KernelError:
        return ""


def _memory_policy() -> dict[str, object]:
    from runtime.memory_policy import FLAGS as FLAGS_OF_POLICY
    from runtime.memory_policy import MODES

    return {"modes": list(MODES), "flags": list(FLAGS_OF_POLICY)}


def _annotations() -> dict[str, str]:
    """Under the names by which callers of runc look these things up, where there is one."""
    found = {
        "org.opencontainers.runc.checkpoint.enabled": "true" if "checkpoint" in COMMANDS else "false",
        "org.ocid.ocirun.version": VERSION,
    }
    version = _libseccomp()
    return {**found, "io.github.seccomp.libseccomp.version": version} if version else found
