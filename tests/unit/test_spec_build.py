"""cri.spec.build: the merge rules of Kubernetes and what must be refused, on plain data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cri.api import api_pb2 as pb
from cri.spec import build, devices, limits, mounts, security
from cri.spec.mounts import PodFiles
from cri.spec.users import User
from cri.spec.validate import InvalidRequest
from imagestore.model import ImageConfig
from runtime import resources
from runtime.fields import Fields

ROOT = User(0, 0, (0,), "/root")
POD = build.PodFacts("pod1", "web-0", "/kubepods/pod1", network="/run/netns/p", ipc="/run/ipc", uts="/run/uts")


def spec(
    config: pb.ContainerConfig | None = None,
    image: ImageConfig | None = None,
    privileged_pod: bool = False,
    unset_seccomp: str = "unconfined",
    **pod: Any,
) -> dict[str, Any]:
    config = config or pb.ContainerConfig()
    sandbox = pb.PodSandboxConfig()
    sandbox.linux.security_context.privileged = privileged_pod
    facts = build.PodFacts(**{**{name: getattr(POD, name) for name in POD.__slots__}, **pod})
    image = image or ImageConfig(cmd=("sh",))
    return build.build(build.SpecInputs("c1", config, sandbox, image, ROOT, facts, unset_seccomp))


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ([], [], ["/ep", "e1", "c1"]),
        (["/x"], [], ["/x"]),
        (["/x"], ["a"], ["/x", "a"]),
        ([], ["a"], ["/ep", "e1", "a"]),
    ],
)
def test_command_and_args_as_kubernetes_merges_them(command: list[str], args: list[str], expected: list[str]) -> None:
    image = ImageConfig(entrypoint=("/ep", "e1"), cmd=("c1",))
    assert build.arguments(pb.ContainerConfig(command=command, args=args), image) == expected


def test_no_command_at_all_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="neither the request nor the image"):
        build.arguments(pb.ContainerConfig(), ImageConfig())


def test_s66_image_env_without_a_value_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    config = pb.ContainerConfig()
    config.envs.add(key="A", value=b"request")
    env = build.environment(config, ImageConfig(env=("SECRET", "A=image", "B=2", "*")), ROOT, "h")
    assert env == ["A=request", "B=2", f"PATH={build.DEFAULT_PATH}", "HOME=/root", "HOSTNAME=h"]


def test_p08_env_bytes_survive_json() -> None:
    config = pb.ContainerConfig()
    config.envs.add(key="RAW", value=bytes(range(1, 256)))
    entry = json.loads(json.dumps(spec(config)))["process"]["env"][0]
    assert os.fsencode(entry) == b"RAW=" + bytes(range(1, 256))


def test_s65_containers_of_one_image_share_nothing_mutable() -> None:
    image = ImageConfig(cmd=("sh",), env=("A=1",))
    first, second = spec(image=image), spec(image=image)
    first["process"]["env"].append("LEAK=1")
    first["mounts"][0]["options"].append("leak")
    first["process"]["capabilities"]["bounding"].append("leak")
    assert "LEAK=1" not in second["process"]["env"]
    assert "leak" not in second["mounts"][0]["options"] + second["process"]["capabilities"]["bounding"]


def test_s05_inheritable_capabilities_are_empty_unless_ambient() -> None:
    plain = security.capabilities(["CHOWN"], [], [], privileged=False)
    assert plain["inheritable"] == plain["ambient"] == []
    ambient = security.capabilities([], ["ALL"], ["NET_BIND_SERVICE"], privileged=False)
    assert ambient["ambient"] == ambient["inheritable"] == ambient["bounding"] == ["CAP_NET_BIND_SERVICE"]


def test_capability_lists_as_cri_words_them() -> None:
    assert security.capabilities([], ["ALL"], [], privileged=False)["bounding"] == []
    assert security.capabilities(["KILL"], ["all"], [], privileged=False)["effective"] == ["CAP_KILL"]
    everything = security.capabilities(["ALL"], ["CAP_KILL"], [], privileged=False)["bounding"]
    assert set(everything) == security.held_capabilities() - {"CAP_KILL"}
    with pytest.raises(InvalidRequest, match="no capability 'NOPE'"):
        security.capabilities(["NOPE"], [], [], privileged=False)


def test_privileged_needs_a_privileged_pod() -> None:
    config = pb.ContainerConfig()
    config.linux.security_context.privileged = True
    with pytest.raises(InvalidRequest, match="not privileged"):
        spec(config)
    built = spec(config, privileged_pod=True)
    assert "maskedPaths" not in built["linux"] and "seccomp" not in built["linux"]
    assert built["linux"]["resources"]["devices"][0]["allow"] is True


def test_s74_masks_by_default() -> None:
    linux = spec()["linux"]
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware", "/sys/devices/virtual/powercap"} <= set(linux["maskedPaths"])
    assert set(linux["readonlyPaths"]) == {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
    assert linux["cgroupsPath"] == "/kubepods/pod1/c1"


@pytest.mark.parametrize("ref", ["", "relative", "/does/not/exist", "/etc/../etc/passwd", "/etc/passwd", "/dev/zero"])
def test_s73_a_bad_localhost_profile_is_an_error(ref: str) -> None:
    config = pb.ContainerConfig()
    config.linux.security_context.seccomp.profile_type = pb.SecurityProfile.Localhost
    config.linux.security_context.seccomp.localhost_ref = ref
    with pytest.raises(InvalidRequest, match="localhost_ref"):
        spec(config)


@pytest.mark.parametrize("unset", ["unconfined", "default"])
def test_seccomp_profiles_by_their_type(unset: str) -> None:
    config = pb.ContainerConfig()
    config.linux.security_context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
    assert spec(config, unset_seccomp=unset)["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    config.linux.security_context.seccomp.profile_type = pb.SecurityProfile.Unconfined
    assert "seccomp" not in spec(config, unset_seccomp=unset)["linux"]


def test_no_seccomp_profile_is_what_the_configuration_says() -> None:
    assert "seccomp" not in spec()["linux"]
    assert spec(unset_seccomp="default")["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    # A message with nothing in it is the zero of its type, not a message that is missing.
    config = pb.ContainerConfig()
    config.linux.security_context.seccomp.SetInParent()
    assert spec(config)["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"


def test_namespaces_follow_the_pod() -> None:
    kinds = {entry["type"]: entry.get("path") for entry in spec()["linux"]["namespaces"]}
    assert kinds == {
        "mount": None,
        "network": "/run/netns/p",
        "ipc": "/run/ipc",
        "uts": "/run/uts",
        "pid": None,
        "cgroup": None,
    }
    host = {entry["type"] for entry in spec(network="", ipc="", uts="", host_pid=True)["linux"]["namespaces"]}
    assert host == {"mount", "cgroup"}


def bind(source: str, target: str, **rest: Any) -> pb.Mount:
    return pb.Mount(host_path=source, container_path=target, **rest)


def build_mounts(*asked: pb.Mount, **rest: Any) -> tuple[list[dict[str, Any]], str]:
    keywords = {"privileged": False, "private_ipc": True, "readonly_rootfs": False, **rest}
    return mounts.build(asked, PodFiles("/p/shm", "/p/hosts", "/p/hostname", "/p/resolv"), **keywords)


def test_mounts_parents_first_and_overriding_the_pods(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    made, _ = build_mounts(
        bind(str(tmp_path / "link"), "/a/b/c", readonly=True),
        bind(str(tmp_path), "/a/b"),
        bind(str(tmp_path), "/etc/hosts"),
    )
    targets = [mount["destination"] for mount in made]
    assert targets.index("/a/b") < targets.index("/a/b/c") and targets.count("/etc/hosts") == 1
    deepest = next(mount for mount in made if mount["destination"] == "/a/b/c")
    assert deepest["source"] == str(tmp_path) and deepest["options"] == ["rbind", "rprivate", "ro"]
    # "rw" would lift what the host forbids: the pod's /dev/shm is nosuid, nodev and noexec, and stays so.
    assert all("rw" not in mount["options"] for mount in made if mount["type"] == "bind")


def test_s02_s63_mounts_that_would_fake_proc_or_sys(tmp_path: Path) -> None:
    for target in ("/proc", "/proc/self", "/proc/sys/kernel", "/sys", "/x/../proc", "/", "/.."):
        with pytest.raises(InvalidRequest, match="container_path"):
            build_mounts(bind(str(tmp_path), target))
    for volume in ("/proc", "/proc/x", "/sys/fs", "/../../etc", "/"):
        with pytest.raises(InvalidRequest, match="VOLUME"):
            mounts.check_volumes([volume])


def test_mount_sources_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no such file"):
        build_mounts(bind(str(tmp_path / "missing"), "/x"))


def test_recursive_read_only_rules(tmp_path: Path) -> None:
    made, _ = build_mounts(bind(str(tmp_path), "/x", readonly=True, recursive_read_only=True))
    assert made[-1]["options"] == ["rbind", "rprivate", "ro", "rro"]
    with pytest.raises(InvalidRequest, match="recursive_read_only"):
        build_mounts(bind(str(tmp_path), "/x", recursive_read_only=True))


def test_s76_devices_are_looked_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/dev/null")
    nodes, rules = devices.build(
        [pb.Device(host_path=str(tmp_path / "link"), container_path="/dev/x", permissions="rw")], privileged=False
    )
    assert (nodes[0]["path"], nodes[0]["type"], nodes[0]["major"], nodes[0]["minor"]) == ("/dev/x", "c", 1, 3)
    assert rules == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"},
    ]
    for path in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(InvalidRequest, match="host_path"):
            devices.build([pb.Device(host_path=str(path), container_path="/dev/x", permissions="r")], privileged=False)
    with pytest.raises(InvalidRequest, match="permissions"):
        devices.build([pb.Device(host_path="/dev/null", permissions="x")], privileged=False)


@pytest.mark.parametrize("key", ["../memory.max", "cgroup.procs", "memory/max", "", "memory", "a.b\n"])
def test_s19_unified_keys_are_file_names(key: str) -> None:
    with pytest.raises(InvalidRequest, match="unified"):
        limits.build(pb.LinuxContainerResources(unified={key: "1"}))


@pytest.mark.parametrize("key", ["memory.high", "memory.swap.max", "hugetlb.2MB.max", "hugetlb.1GB.rsvd.max"])
def test_unified_keys_go_to_the_runtime_as_they_are(key: str) -> None:
    built = limits.build(pb.LinuxContainerResources(unified={key: "1"}))
    assert built["unified"] == {key: "1"}
    assert resources.parse(Fields(built, "resources")).unified == ((key, "1"),)


def test_limits() -> None:
    built = limits.build(
        pb.LinuxContainerResources(
            cpu_quota=50000, cpu_period=100000, cpu_shares=2, cpuset_cpus="0-1", memory_limit_in_bytes=1 << 20
        )
    )
    assert built == {
        "cpu": {"period": 100000, "quota": 50000, "shares": 2, "cpus": "0-1"},
        "memory": {"limit": 1 << 20},
    }
    for bad in (
        {"cpuset_cpus": "0;1"},
        {"memory_limit_in_bytes": -2},
        {"cpu_period": -1},
        {"hugepage_limits": [pb.HugepageLimit(page_size="../x", limit=1)]},
    ):
        with pytest.raises(InvalidRequest, match="resources"):
            limits.build(pb.LinuxContainerResources(**bad))


def test_a_kubelets_zero_limits_for_pages_that_are_not_there_say_nothing() -> None:
    zero, some = pb.HugepageLimit(page_size="3MB", limit=0), pb.HugepageLimit(page_size="2MB", limit=2 << 20)
    assert limits.build(pb.LinuxContainerResources(hugepage_limits=[zero])) == {}
    built = limits.build(pb.LinuxContainerResources(hugepage_limits=[zero, some]))
    assert built == {"hugepageLimits": [{"pageSize": "2MB", "limit": 2 << 20}]}


def test_exec_keeps_the_containers_identity() -> None:
    config = spec()
    process = build.exec_process(config, ["ls", "-l"])
    assert process["args"] == ["ls", "-l"] and process["capabilities"] == config["process"]["capabilities"]
    assert config["process"]["args"] == ["sh"]
    with pytest.raises(InvalidRequest, match="cmd"):
        build.exec_process(config, [])


def test_a_cgroup_by_each_driver() -> None:
    assert build.cgroup(POD, "c1") == "/kubepods/pod1/c1" == spec()["linux"]["cgroupsPath"]
    slice_ = "/kubepods.slice/kubepods-pod1.slice"
    facts = build.PodFacts("pod1", "web-0", slice_, systemd=True)
    assert build.cgroup(facts, "c1") == f"{slice_}/ocid-c1.scope"
    assert spec(cgroup_parent=slice_, systemd=True)["linux"]["cgroupsPath"] == "kubepods-pod1.slice:ocid:c1"
