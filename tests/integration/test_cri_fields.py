"""Fields of the CRI's messages, each by its effect in a container or by its refusal: what no other file looks at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from conformance.cri_client import container
from cri.api import api_pb2 as pb
from runtime.linux.mount import MS_BIND, MS_PRIVATE, MS_REC, MS_SHARED, mount, umount2
from tests.e2e import Node, busybox, messages, node, stocked
from tests.fakes.registry import FakeRegistry
from tests.fakes.snapshots import directory, file
from tests.integration.test_cri_images_mounted import built
from tests.integration.test_cri_userns import mapped, pid_of
from tests.support import eventually, needs

PASSWD = b"root:x:0:0::/root:/bin/sh\nweb:x:33:44::/srv:/bin/sh\nother:x:55:66::/:/bin/sh\n"
GROUP = b"root:x:0:\nweb:x:44:\nextra:x:77:web,other\nmore:x:78:other\n"


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    needs("root", "overlay", "busybox")
    with stocked() as made:
        files = [directory("etc"), file("etc/passwd", PASSWD), file("etc/group", GROUP)]
        made.add("users", "1", built(files, base=busybox(), user="web"))
        yield made


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> Iterator[Node]:
    top = tmp_path_factory.mktemp("fields")
    (top / "cdi").mkdir()
    runtime = f'cdi_dirs = ["{top}/cdi"]\npod_annotations = ["pod.example/*"]\ncontainer_annotations = ["c.*"]'
    with node(top / "n", runtime=runtime) as made:
        made.image = f"{registry.name}/busybox:1"
        made.client.pull(made.image)
        made.drop(made.run(made.image, ["true"])[0])
        yield made


def shown(here: Node, script: str, change: Any = None, *, pod_config: Any = None) -> list[str]:
    """What a container prints whose config `change` has changed."""
    config = pod_config or here.pod_config()
    pod = here.client.run_pod(config)
    try:
        wanted = container("main", here.image, ["sh", "-c", script])
        if change is not None:
            change(wanted)
        one = here.client.create(pod, wanted, config)
        here.client.start(one)
        here.client.wait_exit(one)
        return messages(Path(config.log_directory) / "main.log")
    finally:
        here.drop(pod)


def security(config: Any) -> Any:
    return config.linux.security_context


# ------------------------------------------------------------------------------------------------------ confinement


def test_seccomp_of_each_kind(here: Node, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    rules = [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    script = "grep ^Seccomp: /proc/self/status; mkdir /x 2>&1; unshare -U true 2>&1"

    def of(kind: Any, ref: str = "") -> list[str]:
        def change(config: Any) -> None:
            security(config).seccomp.profile_type = kind
            security(config).seccomp.localhost_ref = ref

        return shown(here, script, change)

    assert of(pb.SecurityProfile.Unconfined)[0].split() == ["Seccomp:", "0"]
    default = of(pb.SecurityProfile.RuntimeDefault)
    assert default[0].split() == ["Seccomp:", "2"] and "not permitted" in default[-1]
    local = of(pb.SecurityProfile.Localhost, str(profile))
    assert local[0].split() == ["Seccomp:", "2"] and "not supported" in local[1].lower()


def test_no_new_privs_capabilities_and_privileged(here: Node) -> None:
    def change(config: Any) -> None:
        security(config).no_new_privs = True
        security(config).capabilities.drop_capabilities.append("ALL")
        security(config).capabilities.add_capabilities.append("CHOWN")

    said = shown(here, "grep -E '^(NoNewPrivs|CapEff)' /proc/self/status", change)
    assert [line.split()[1] for line in sorted(said)] == ["0000000000000001", "1"]
    config = here.pod_config()
    config.linux.security_context.privileged = True

    def privileged(config: Any) -> None:
        security(config).privileged = True

    said = shown(here, "ls /dev/loop-control /dev/kmsg; touch /sys/x 2>&1; grep -c . /proc/kcore", privileged,
                 pod_config=config)  # fmt: skip
    assert "/dev/kmsg" in said


def test_masked_and_readonly_paths_are_the_requests(here: Node) -> None:
    def change(config: Any) -> None:
        security(config).masked_paths.extend(["/proc/uptime", "/etc"])
        security(config).readonly_paths.append("/root")

    said = shown(here, "wc -c < /proc/uptime; ls /etc | wc -l; touch /root/x 2>&1; cat /proc/version | wc -l", change)
    assert (said[0], said[1], said[3]) == ("0", "0", "1") and "Read-only" in said[2]


def test_proc_is_unmasked_in_a_user_namespace_where_nothing_is_masked(here: Node) -> None:
    script = "grep -c ' /proc/' /proc/mounts"
    assert shown(here, script, pod_config=mapped(here.pod_config(network=True))) == ["0"]
    assert int(shown(here, script)[0]) > 5


def test_users_and_groups(here: Node) -> None:
    def change(config: Any) -> None:
        security(config).run_as_user.value = 1234
        security(config).run_as_group.value = 77
        security(config).supplemental_groups.extend([88, 99])
        security(config).supplemental_groups_policy = pb.Strict

    said = shown(here, "id -u; id -g; grep ^Groups /proc/self/status; echo $HOME", change)
    assert said[:2] == ["1234", "77"] and said[2].split()[1:] == ["77", "88", "99"]


def test_environment_directory_and_read_only_root(here: Node) -> None:
    def change(config: Any) -> None:
        config.working_dir = "/tmp"
        config.envs.add(key="WORD", value=b"said")
        security(config).readonly_rootfs = True

    said = shown(here, "pwd; echo $WORD; touch /x 2>&1; touch /dev/shm/x && echo shm", change)
    assert said[:2] == ["/tmp", "said"] and "Read-only" in said[2] and said[3] == "shm"


@pytest.mark.parametrize(
    ("policy", "fields", "expected"),
    [
        (pb.Merge, {}, ["33", "44", "44 77 99", "/srv"]),  # the image's USER web, with what /etc/group adds
        (pb.Strict, {}, ["33", "44", "44 99", "/srv"]),
        (pb.Merge, {"run_as_username": "other"}, ["55", "66", "66 77 78 99", "/"]),
        (pb.Strict, {"run_as_username": "other"}, ["55", "66", "66 99", "/"]),
        (pb.Merge, {"run_as_user": 55, "run_as_group": 5}, ["55", "5", "5 77 78 99", "/"]),
        (pb.Strict, {"run_as_user": 4321}, ["4321", "0", "0 99", "/"]),
    ],
)
def test_users_and_groups_of_the_image(
    here: Node, registry: FakeRegistry, policy: Any, fields: dict[str, Any], expected: list[str]
) -> None:
    here.client.pull(f"{registry.name}/users:1")

    def change(config: Any) -> None:
        config.image.image = f"{registry.name}/users:1"
        security(config).supplemental_groups.append(99)
        security(config).supplemental_groups_policy = policy
        for name, value in fields.items():
            if isinstance(value, int):
                getattr(security(config), name).value = value
            else:
                setattr(security(config), name, value)

    said = shown(here, "id -u; id -g; grep ^Groups /proc/self/status; echo $HOME", change)
    assert [said[0], said[1], " ".join(said[2].split()[1:]), said[3]] == expected


# ----------------------------------------------------------------------------------------------------------- mounts


def test_recursive_read_only_and_mount_options(here: Node, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    mount("tmpfs", str(source / "sub"), "tmpfs", 0)
    try:

        def plain(config: Any) -> None:
            config.mounts.add(container_path="/m", host_path=str(source), readonly=True)

        def recursive(config: Any) -> None:
            config.mounts.add(
                container_path="/m", host_path=str(source), readonly=True, recursive_read_only=True,
                mount_options=["noexec", "noatime"],
            )  # fmt: skip

        script = "touch /m/x 2>&1; touch /m/sub/x 2>&1 && echo written; grep ' /m ' /proc/mounts"
        assert "written" in shown(here, script, plain)
        said = shown(here, script, recursive)
        assert "written" not in said and {"ro", "noexec", "noatime"} <= set(said[-1].split()[3].split(","))
    finally:
        umount2(str(source / "sub"))


def test_what_the_host_mounts_later_arrives_where_asked(here: Node, tmp_path: Path) -> None:
    source = tmp_path / "shared"
    (source / "late").mkdir(parents=True)
    mount(str(source), str(source), None, MS_BIND)
    mount(None, str(source), None, MS_SHARED | MS_REC)
    config = here.pod_config()
    pod = here.client.run_pod(config)
    try:
        wanted = container("main", here.image, ["sleep", "1000"])
        wanted.mounts.add(container_path="/slave", host_path=str(source), propagation=pb.PROPAGATION_HOST_TO_CONTAINER)
        wanted.mounts.add(container_path="/private", host_path=str(source))
        one = here.client.create(pod, wanted, config)
        here.client.start(one)
        mount("tmpfs", str(source / "late"), "tmpfs", 0)
        (source / "late/file").touch()
        listed = here.client.exec_sync(one, ["ls", "/slave/late", "/private/late"])[1].decode()
        assert listed.split() == ["/private/late:", "/slave/late:", "file"]
        umount2(str(source / "late"))
    finally:
        here.drop(pod)
        mount(None, str(source), None, MS_PRIVATE | MS_REC)
        umount2(str(source))


def test_a_termination_log_is_a_file_that_the_container_writes(here: Node, tmp_path: Path) -> None:
    log = tmp_path / "termination"
    log.touch()

    def change(config: Any) -> None:
        config.mounts.add(container_path="/dev/termination-log", host_path=str(log))

    shown(here, "echo why > /dev/termination-log", change)
    assert log.read_text() == "why\n"


def test_devices_with_their_permissions(here: Node) -> None:
    def change(config: Any) -> None:
        config.devices.add(host_path="/dev/fuse", container_path="/dev/nil", permissions="r")

    said = shown(here, ": < /dev/nil && echo read; (: > /dev/nil) 2>/dev/null || echo refused", change)
    assert said == ["read", "refused"]


# ------------------------------------------------------------------------------------------------------ CDI, others


def test_a_cdi_device_with_all_that_belongs_to_it(here: Node, tmp_path: Path) -> None:
    hook, mark, library = tmp_path / "hook", tmp_path / "mark", tmp_path / "library"
    hook.write_text(f'#!/bin/sh\necho "$1 $WHO" >> {mark}\n')
    hook.chmod(0o755)
    library.write_text("of the driver\n")
    made = {"hookName": "createRuntime", "path": str(hook), "args": ["h", "made"], "env": ["WHO=me"]}
    document = {
        "cdiVersion": "1.0.0",
        "kind": "vendor.test/thing",
        "containerEdits": {"env": ["COMMON=1"]},
        "devices": [
            {
                "name": "0",
                "containerEdits": {
                    "env": ["DEVICE=0"],
                    "deviceNodes": [{"path": "/dev/thing0", "hostPath": "/dev/zero", "permissions": "rw"}],
                    "mounts": [{"hostPath": str(library), "containerPath": "/usr/lib/driver", "options": ["ro"]}],
                    "hooks": [made],
                    "additionalGids": [4242],
                },
            },
            {"name": "1", "containerEdits": {"deviceNodes": [{"path": "/dev/thing1", "hostPath": "/dev/null"}]}},
        ],
    }  # fmt: skip
    file = here.directory.parent / "cdi" / "vendor.json"
    file.write_text(json.dumps(document))

    def change(config: Any) -> None:
        config.CDI_devices.add(name="vendor.test/thing=0")
        config.annotations["cdi.k8s.io/plugin_1"] = "vendor.test/thing=1"

    script = (
        "echo $COMMON$DEVICE; head -c 3 /dev/thing0 | wc -c; cat /usr/lib/driver; echo x > /dev/thing1 && echo null;"
        "grep ^Groups /proc/self/status"
    )
    said = shown(here, script, change)
    assert said[:4] == ["10", "3", "of the driver", "null"] and "4242" in said[4].split()
    assert mark.read_text() == "made me\n"

    def missing(config: Any) -> None:
        config.CDI_devices.add(name="vendor.test/thing=9")

    with pytest.raises(grpc.RpcError, match="unresolvable CDI devices vendor.test/thing=9"):
        shown(here, "true", missing)
    file.unlink()


def test_annotations_are_passed_on_as_the_configuration_allows(here: Node) -> None:
    config = here.pod_config()
    config.annotations.update({"pod.example/a": "pod", "other/b": "no", "c.both": "pod"})
    pod = here.client.run_pod(config)
    wanted = container("main", here.image, ["sleep", "1000"])
    wanted.annotations.update({"c.x": "container", "run.oci.keep_original_groups": "1"})
    wanted.annotations["io.kubernetes.cri.sandbox-id"] = "forged"
    one = here.client.create(pod, wanted, config)
    request = pb.ContainerStatusRequest(container_id=one, verbose=True)
    spec = json.loads(here.client.runtime.ContainerStatus(request).info["info"])["runtimeSpec"]
    assert spec["annotations"] == {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": pod,
        "io.kubernetes.cri.container-name": "main",
        "pod.example/a": "pod",
        "c.x": "container",
    }
    here.drop(pod)


def test_an_update_sets_the_oom_score_of_every_process(here: Node) -> None:
    config = here.pod_config()
    pod = here.client.run_pod(config)
    wanted = container("main", here.image, ["sh", "-c", "sleep 999 & sleep 1000"])
    wanted.linux.resources.oom_score_adj = 100
    one = here.client.create(pod, wanted, config)
    here.client.start(one)
    pid = pid_of(here, one)

    def scores() -> list[str]:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [Path(f"/proc/{each}/oom_score_adj").read_text().strip() for each in (pid, *children)]

    eventually(lambda: scores() == ["100"] * 2, what="a child")
    request = pb.UpdateContainerResourcesRequest(
        container_id=one, linux=pb.LinuxContainerResources(oom_score_adj=700, cpu_shares=512)
    )
    here.client.runtime.UpdateContainerResources(request)
    assert scores() == ["700"] * 2
    shown_now = here.client.status(one).resources.linux
    assert (shown_now.oom_score_adj, shown_now.cpu_shares) == (700, 512)
    request.windows.SetInParent()
    with pytest.raises(grpc.RpcError, match="windows: this node runs Linux"):
        here.client.runtime.UpdateContainerResources(request)
    request.ClearField("windows")
    request.linux.oom_score_adj = 1001
    with pytest.raises(grpc.RpcError, match="oom_score_adj: 1001"):
        here.client.runtime.UpdateContainerResources(request)
    here.drop(pod)


def test_a_pods_limits_may_come_before_its_first_container(here: Node) -> None:
    needs("cgroup1")
    before = here.held()
    config = here.pod_config()
    config.linux.cgroup_parent = f"/{here.tag}/pod-of-its-own"
    pod = here.client.run_pod(config)
    request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod)
    request.resources.cpu_shares = 333
    here.client.runtime.UpdatePodSandboxResources(request)
    (file,) = Path("/sys/fs/cgroup").glob(f"*/{here.tag}/pod-of-its-own/cpu.shares") or [Path("/no")]
    assert file.read_text() == "333\n"
    one = here.client.create(pod, container("main", here.image, ["sleep", "1000"]), config)
    here.client.start(one)
    assert here.client.exec_sync(one, ["cat", "/proc/self/cgroup"])[0] == 0 and file.read_text() == "333\n"
    here.drop(pod)
    here.settles(before)


def test_the_stop_signal_of_the_request_wins(here: Node) -> None:
    config = here.pod_config()
    pod = here.client.run_pod(config)
    wanted = container("main", here.image, ["sh", "-c", "trap 'exit 33' USR1; echo up; while :; do sleep 0.05; done"])
    wanted.stop_signal = pb.SIGNAL_SIGUSR1
    one = here.client.create(pod, wanted, config)
    here.client.start(one)
    eventually(lambda: messages(Path(config.log_directory) / "main.log") == ["up"], what="the trap")
    here.client.stop(one, 10)
    status = here.client.status(one)
    assert (status.exit_code, status.stop_signal) == (33, pb.SIGNAL_SIGUSR1)
    here.drop(pod)


# --------------------------------------------------------------------------------------------------------- refusals


def _two_users(config: Any) -> None:
    context = config.linux.security_context
    context.run_as_user.value, context.run_as_username = 5, "root"


def _set(path: str, value: Any) -> Any:
    def change(config: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            config = getattr(config, name)
        if isinstance(value, dict):
            getattr(config, last).update(value)
        elif isinstance(value, list):
            getattr(config, last).extend(value)
        elif hasattr(value, "DESCRIPTOR"):
            getattr(config, last).CopyFrom(value)
        else:
            setattr(config, last, value)

    return change


LOCALHOST = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="some-profile")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("windows", pb.WindowsContainerConfig()), "windows: this node runs Linux"),
        (_set("image.runtime_handler", "no-such"), "no handler 'no-such'"),
        (_set("linux.security_context.apparmor", LOCALHOST), "apparmor: 'some-profile' cannot be applied"),
        (_set("linux.security_context.apparmor_profile", "localhost/p"), "apparmor: 'p' cannot be applied"),
        (_set("linux.security_context.apparmor_profile", "odd"), "apparmor_profile: 'odd' is none of"),
        (_set("linux.security_context.selinux_options.type", "spc_t"), "selinux_options: this kernel has no SELinux"),
        (_set("linux.security_context.selinux_options.role", "a:b"), "selinux_options.role: 'a:b'"),
        (_set("linux.security_context.selinux_options.user", "a:b"), "selinux_options.user: 'a:b'"),
        (_set("linux.security_context.seccomp_profile_path", "x"), "seccomp_profile_path"),
        (_set("linux.security_context.namespace_options.network", pb.CONTAINER), "namespace_options.network"),
        (_set("linux.security_context.namespace_options.ipc", pb.NODE), "namespace_options.ipc"),
        (_set("linux.security_context.namespace_options.target_id", "x"), "target_id: needs pid TARGET"),
        (_set("linux.security_context.run_as_group", pb.Int64Value(value=1)), "run_as_group: needs run_as_user"),
        (_two_users, "run_as_username: not beside run_as_user"),
        (_set("mounts", [pb.Mount(container_path="/x", host_path="/tmp", image_sub_path="y")]), "image_sub_path"),
        (_set("mounts", [pb.Mount(container_path="/x", host_path="/", mount_options=["bind"])]), "mount_options"),
        (_set("mounts", [pb.Mount(container_path="/x", host_path="/", uidMappings=[pb.IDMapping(length=1)])]),
         "gidMappings"),
    ],
)  # fmt: skip
def test_a_container_that_cannot_be_as_asked_is_refused_by_the_field(here: Node, change: Any, message: str) -> None:
    with pytest.raises(grpc.RpcError, match=message) as caught:
        shown(here, "true", change)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("windows", pb.WindowsPodSandboxConfig()), "windows: this node runs Linux"),
        (_set("linux.security_context.apparmor", LOCALHOST), "apparmor: 'some-profile' cannot be applied"),
        (_set("linux.security_context.selinux_options.level", "s0:c1"), "selinux_options: this kernel has no SELinux"),
        (_set("linux.security_context.seccomp_profile_path", "x"), "seccomp_profile_path"),
        (_set("linux.security_context.seccomp", LOCALHOST), "localhost_ref"),
        (_set("linux.security_context.run_as_user", pb.Int64Value(value=-1)), "run_as_user"),
        (_set("linux.security_context.run_as_group", pb.Int64Value(value=1)), "run_as_group: needs run_as_user"),
        (_set("linux.security_context.supplemental_groups", [1 << 40]), "supplemental_groups"),
        (_set("linux.resources.cpu_shares", -1), "linux.resources: resources.cpu_shares"),
        (_set("linux.overhead.memory_limit_in_bytes", -2), "linux.overhead: resources.memory_limit"),
        (_set("linux.sysctls", {"kernel.core_pattern": "x"}), "sysctls.kernel.core_pattern: not namespaced"),
        (_set("port_mappings", [pb.PortMapping(container_port=1, protocol=9)]), r"port_mappings\[0\].protocol"),
    ],
)
def test_a_pod_that_cannot_be_as_asked_is_refused_by_the_field(here: Node, change: Any, message: str) -> None:
    before = here.held()
    config = here.pod_config()
    change(config)
    with pytest.raises(grpc.RpcError, match=message) as caught:
        here.client.run_pod(config)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert here.held() == before


def test_what_this_kernel_gives_anyway_is_no_error(here: Node) -> None:
    def change(config: Any) -> None:
        security(config).apparmor.profile_type = pb.SecurityProfile.RuntimeDefault
        security(config).apparmor_profile = "runtime/default"
        config.mounts.add(container_path="/m", host_path="/tmp", selinux_relabel=True)

    assert shown(here, "echo ran", change) == ["ran"]


def test_a_pull_for_a_handler_that_is_none(here: Node) -> None:
    spec = pb.ImageSpec(image=here.image, runtime_handler="no-such")
    with pytest.raises(grpc.RpcError, match="no handler 'no-such'"):
        here.client.images.PullImage(pb.PullImageRequest(image=spec))
    spec.runtime_handler = "native"
    assert here.client.images.PullImage(pb.PullImageRequest(image=spec)).image_ref
