"""`ocirun features` against the parser of config.json: what it names is taken, and what it leaves out is refused.

Whoever teaches the parser something has to say so in runtime/commands/features.py, or this fails; and the other way
round.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime import mounts, spec
from runtime.cli import COMMANDS
from runtime.commands.features import features
from runtime.errors import RuntimeFailure
from runtime.fields import Fields

FOUND: dict[str, Any] = features()
LINUX: dict[str, Any] = FOUND["linux"]


def config(linux: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A config.json with the namespaces that nothing is possible without, and `linux` and `top` over it."""
    base = {"namespaces": [{"type": "mount"}, {"type": "network"}]}
    return {"ociVersion": "1.3.0", "root": {"path": "rootfs"}, "linux": {**base, **(linux or {})}, **top}


def taken(document: dict[str, Any]) -> bool:
    try:
        spec.parse(json.dumps(document).encode())
    except RuntimeFailure:
        return False
    return True


def process(**fields: Any) -> dict[str, Any]:
    return config(process={"args": ["true"], "cwd": "/", **fields})


def with_resources(**fields: Any) -> dict[str, Any]:
    return config({"resources": fields})


def with_seccomp(**fields: Any) -> dict[str, Any]:
    return config({"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", **fields}})


def test_the_bare_config_is_taken() -> None:
    assert taken(config()) and taken(process()) and taken(with_seccomp())


@pytest.mark.parametrize(
    "version", ["1.0.0", "1.0.2-dev", "1.1.0", "1.2.1", FOUND["ociVersionMin"], FOUND["ociVersionMax"]]
)
def test_versions(version: str) -> None:
    assert taken({**config(), "ociVersion": version})
    assert not taken({**config(), "ociVersion": "2.0.0"}) and not taken({**config(), "ociVersion": "0.9"})


def test_hooks() -> None:
    assert set(FOUND["hooks"]) == {
        *("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"),
    }
    for kind in FOUND["hooks"]:
        read = spec.parse(json.dumps(config(hooks={kind: [{"path": "/bin/true"}]})).encode()).hooks
        assert [hook.path for kept in read._values() for hook in kept] == ["/bin/true"], kind  # type: ignore[attr-defined]


@pytest.mark.parametrize("option", FOUND["mountOptions"])
def test_mount_options_are_understood_and_not_passed_on(option: str) -> None:
    entry = {"destination": "/x", "type": "tmpfs", "source": "tmpfs", "options": [option]}
    if option in ("bind", "rbind", "idmap", "ridmap"):
        entry.update(type="bind", source="/x", options=["bind", option])
    read = mounts.parse(Fields(entry, "mounts[0]"))
    assert option not in str(getattr(read, "data", "")).split(","), read


def test_mount_options_that_nobody_knows_are_not_named() -> None:
    assert not {"size", "mode", "acl", "something"} & set(FOUND["mountOptions"])


def test_namespaces() -> None:
    every = {"pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time"}
    for kind in (*every, "other"):
        mappings = [{"containerID": 0, "hostID": 0, "size": 1}]
        extra = {"uidMappings": mappings, "gidMappings": mappings} if kind == "user" else {}
        kinds = {"mount", kind}
        document = config({"namespaces": [{"type": one} for one in kinds], **extra})
        assert taken(document) == (kind in LINUX["namespaces"]), kind
    assert set(LINUX["namespaces"]) <= every


def test_capabilities() -> None:
    assert len(LINUX["capabilities"]) >= 41 and set(LINUX["capabilities"]) > {"CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"}
    read = spec.parse(json.dumps(process(capabilities={"bounding": LINUX["capabilities"]})).encode()).process
    assert read is not None and read.capabilities is not None and not read.capabilities.unknown


def test_seccomp_lists() -> None:
    seccomp = LINUX["seccomp"]
    for action in (*seccomp["actions"], "SCMP_ACT_OTHER"):
        rule = {"names": ["mkdir"], "action": action}
        known = action in seccomp["actions"]
        assert taken(with_seccomp(syscalls=[rule], listenerPath="/agent")) == known, action
    for operator in (*seccomp["operators"], "SCMP_CMP_OTHER"):
        rule = {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "op": operator, "value": 1}]}  # type: ignore[dict-item]
        assert taken(with_seccomp(syscalls=[rule])) == (operator in seccomp["operators"]), operator
    for arch in (*seccomp["archs"], "SCMP_ARCH_OTHER"):
        assert taken(with_seccomp(architectures=[arch])) == (arch in seccomp["archs"]), arch
    for flag in (*seccomp["knownFlags"], "SECCOMP_FILTER_FLAG_OTHER"):
        assert taken(with_seccomp(flags=[flag])) == (flag in seccomp["knownFlags"]), flag
    assert set(seccomp["supportedFlags"]) <= set(seccomp["knownFlags"]) and seccomp["enabled"] is True
    # runtime-spec 1.3's own lists
    assert len(seccomp["actions"]) == 9 and len(seccomp["operators"]) == 7
    assert len(seccomp["archs"]) == 23 and len(seccomp["knownFlags"]) == 4


def test_memory_policies() -> None:
    policy = LINUX["memoryPolicy"]
    for mode in (*policy["modes"], "MPOL_OTHER"):
        assert taken(config({"memoryPolicy": {"mode": mode}})) == (mode in policy["modes"]), mode
    for flag in (*policy["flags"], "MPOL_F_OTHER"):
        document = config({"memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0", "flags": [flag]}})
        assert taken(document) == (flag in policy["flags"]), flag


USER = {
    "namespaces": [{"type": "mount"}, {"type": "network"}, {"type": "user"}],
    "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 9}],
    "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 9}],
}
IDMAPPED = {
    "destination": "/x",
    "type": "bind",
    "source": "/x",
    "options": ["bind"],
    "uidMappings": USER["uidMappings"],
    "gidMappings": USER["gidMappings"],
}


@pytest.mark.parametrize(
    ("said", "document"),
    [
        (LINUX["apparmor"]["enabled"], process(apparmorProfile="some")),
        (LINUX["selinux"]["enabled"], process(selinuxLabel="some")),
        (LINUX["intelRdt"]["enabled"], config({"intelRdt": {"closID": "gold"}})),
        (LINUX["intelRdt"]["schemata"], config({"intelRdt": {"schemata": ["L3:0=f"]}})),
        (LINUX["intelRdt"]["monitoring"], config({"intelRdt": {"enableMonitoring": True}})),
        (LINUX["mountExtensions"]["idmap"]["enabled"], config(USER, mounts=[IDMAPPED])),
        (LINUX["netDevices"]["enabled"], config({"netDevices": {"eth0": {"name": "eth1"}}})),
        (LINUX["cgroup"]["rdma"], with_resources(rdma={"mlx5_1": {"hcaHandles": 1}})),
        ("memoryPolicy" in LINUX, config({"memoryPolicy": {"mode": "MPOL_LOCAL"}})),
        ("time" in LINUX["namespaces"], config({"timeOffsets": {"monotonic": {"secs": 1}}})),
    ],
)
def test_one_word_each(said: bool, document: dict[str, Any]) -> None:
    if "timeOffsets" in document["linux"]:
        document["linux"]["namespaces"].append({"type": "time"})
    assert taken(document) == said


def test_what_is_no_field_of_config_json() -> None:
    """The systemd driver is a flag of the command line; where there is no systemd it says so itself."""
    from runtime.cli import main

    assert LINUX["cgroup"]["systemd"] and LINUX["cgroup"]["systemdUser"] and main(["--systemd-cgroup", "list"]) == 0
    assert FOUND["annotations"]["org.opencontainers.runc.checkpoint.enabled"] == str("checkpoint" in COMMANDS).lower()


@pytest.mark.parametrize(
    "annotation",
    ["org.criu.config", "run.oci.systemd.subgroup", "run.oci.hooks.stdout", "io.kubernetes.cri-o.cpu-quota"],
)
def test_s60_annotations_that_are_not_named_change_nothing(annotation: str) -> None:
    named = FOUND["potentiallyUnsafeConfigAnnotations"]
    if any(annotation == name or (name.endswith(".") and annotation.startswith(name)) for name in named):
        pytest.skip(f"{annotation} is named as unsafe")
    plain, loud = (spec.parse(json.dumps(config(**top)).encode()) for top in ({}, {"annotations": {annotation: "1"}}))
    assert plain == loud.changed(annotations=())
