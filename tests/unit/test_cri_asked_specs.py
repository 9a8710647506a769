"""What a request says of a container is in the config.json that its runtime reads. Each of these fails when its field
is ignored (docs/cri-fields.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cri.api import api_pb2 as pb
from cri.errors import CallFailed
from cri.spec import confine
from runtime import labels
from tests.fakes.node import IMAGE, Rig, on_rig


async def _spec(rig: Rig, change: Callable[[Any], None], pod: str = "") -> dict[str, Any]:
    """config.json of a container whose config `change` has changed."""
    config = rig.container_config("main")
    change(config)
    request = pb.CreateContainerRequest(pod_sandbox_id=pod or await rig.run_pod(), config=config)
    one = (await rig.call("CreateContainer", request)).container_id
    found: dict[str, Any] = json.loads((rig.node.paths.bundle(one) / "config.json").read_text())
    await rig.remove(one)
    if not pod:
        await rig.stop_pod(request.pod_sandbox_id)
        await rig.remove_pod(request.pod_sandbox_id)
    return found


def test_command_arguments_and_environment(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def change(config: Any) -> None:
            config.command[:] = ["/bin/ls", "-l"]
            config.args[:] = ["/etc"]
            config.envs.add(key="WORD", value=b"said")

        process = (await _spec(rig, change))["process"]
        assert process["args"] == ["/bin/ls", "-l", "/etc"]
        assert "WORD=said" in process["env"]

    on_rig(tmp_path, body)


def test_mounts_are_where_they_are_asked_for(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def change(config: Any) -> None:
            config.mounts.add(container_path="/data", host_path=str(tmp_path))

        mounts = (await _spec(rig, change))["mounts"]
        assert [one["destination"] for one in mounts if one["source"] == str(tmp_path)] == ["/data"]

    on_rig(tmp_path, body)


def test_a_privileged_container_in_a_privileged_pod(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def change(config: Any) -> None:
            config.linux.security_context.privileged = True

        linux = pb.LinuxPodSandboxConfig()
        linux.security_context.privileged = True
        spec = await _spec(rig, change, await rig.run_pod(linux=linux))
        assert "maskedPaths" not in spec["linux"] and "CAP_SYS_ADMIN" in spec["process"]["capabilities"]["bounding"]

    on_rig(tmp_path, body)


def test_ambient_capabilities(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def change(config: Any) -> None:
            config.linux.security_context.capabilities.add_ambient_capabilities.append("NET_BIND_SERVICE")

        sets = (await _spec(rig, change))["process"]["capabilities"]
        assert sets["ambient"] == sets["inheritable"] == ["CAP_NET_BIND_SERVICE"]

    on_rig(tmp_path, body)


def test_limits_without_a_controller_here(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def change(config: Any) -> None:
            config.linux.resources.cpuset_mems = "0"
            config.linux.resources.unified["memory.high"] = "1048576"
            config.linux.resources.hugepage_limits.add(page_size="1GB", limit=1 << 30)

        resources = (await _spec(rig, change))["linux"]["resources"]
        assert resources["cpu"]["mems"] == "0"
        assert resources["unified"] == {"memory.high": "1048576"}
        assert resources["hugepageLimits"] == [{"pageSize": "1GB", "limit": 1 << 30}]

    on_rig(tmp_path, body)


def test_profiles_where_the_kernel_has_apparmor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine.security, "apparmor_enabled", lambda: True)

    async def body(rig: Rig) -> None:
        def mine(config: Any) -> None:
            config.linux.security_context.apparmor.profile_type = pb.SecurityProfile.Localhost
            config.linux.security_context.apparmor.localhost_ref = "localhost/mine"

        def deprecated(config: Any) -> None:
            config.linux.security_context.apparmor_profile = "localhost/old"

        assert (await _spec(rig, mine))["process"]["apparmorProfile"] == "mine"
        assert (await _spec(rig, deprecated))["process"]["apparmorProfile"] == "old"

    on_rig(tmp_path, body)


def test_labels_where_the_kernel_has_selinux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "has_selinux", lambda: True)

    async def body(rig: Rig) -> None:
        def change(config: Any) -> None:
            config.linux.security_context.selinux_options.CopyFrom(
                pb.SELinuxOption(user="u", role="r", type="t", level="s0:c1,c2")
            )

        def relabelled(config: Any) -> None:
            config.mounts.add(container_path="/m", host_path="/tmp", selinux_relabel=True)

        spec = await _spec(rig, change)
        assert spec["process"]["selinuxLabel"] == "u:r:t:s0:c1,c2"
        assert spec["linux"]["mountLabel"] == "u:object_r:container_file_t:s0:c1,c2"
        with pytest.raises(CallFailed, match=r"mounts\[0\].selinux_relabel: not supported"):
            await _spec(rig, relabelled)

    on_rig(tmp_path, body)


def test_an_image_is_mounted_with_the_ids_of_the_pod_or_not_at_all(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        linux = pb.LinuxPodSandboxConfig()
        options = linux.security_context.namespace_options
        options.network = pb.NODE  # the fake shim pins no namespace
        options.userns_options.mode = pb.POD
        for ids in (options.userns_options.uids, options.userns_options.gids):
            ids.add(host_id=300_000, container_id=0, length=65536)
        pod = await rig.run_pod(linux=linux)

        def mapped(first: int) -> Callable[[Any], None]:
            def change(config: Any) -> None:
                mount = config.mounts.add(container_path="/image", readonly=True, image=pb.ImageSpec(image=IMAGE))
                for ids in (mount.uidMappings, mount.gidMappings):
                    ids.add(host_id=first, container_id=0, length=65536)

            return change

        mounts = (await _spec(rig, mapped(300_000), pod))["mounts"]
        assert "idmap" in next(one["options"] for one in mounts if one["destination"] == "/image")
        with pytest.raises(CallFailed, match=r"mounts\[0\].uidMappings: an image's files have the ids of the pod"):
            await _spec(rig, mapped(0), pod)

    on_rig(tmp_path, body)
