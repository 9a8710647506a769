"""Mounts of images in containers: what is seen there, by whom, and that nothing leads out or stays behind."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from conformance.cri_client import container
from cri.api import api_pb2 as pb
from tests.e2e import Node, messages, node, stocked
from tests.fakes.registry import OCI_MANIFEST, BuiltImage, FakeRegistry
from tests.fakes.snapshots import directory, file, symlink, tarball, whiteout
from tests.integration.test_cri_userns import FIRST, mapped
from tests.integration.test_imagestore_artifacts import artifact
from tests.support import needs

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
BOTTOM = [
    directory("data"),
    file("data/one", b"1\n", uid=7, gid=8),
    file("data/gone", b"x\n"),
    directory("data/deep"),
    file("data/deep/two", b"2\n"),
    file("suid", b"#!/bin/sh\n", mode=0o4755),
    symlink("out", "/etc"),
    symlink("up", "../../../../etc"),
    symlink("in", "data/deep"),
]
TOP = [whiteout("data/gone"), file("data/three", b"3\n")]


def built(*layers: list[Any], base: BuiltImage | None = None, user: str = "") -> BuiltImage:
    """An image of these layers, on top of those of `base`."""
    below = json.loads(base.manifest)["layers"] if base is not None else []
    tars = [tarball(members) for members in layers]
    blobs = [gzip.compress(tar, mtime=0) for tar in tars]
    diff_ids = tuple(f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars)
    diff_ids = (*(base.diff_ids if base is not None else ()), *diff_ids)
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"User": user},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
    }
    config = json.dumps(document).encode()
    digests = [f"sha256:{hashlib.sha256(blob).hexdigest()}" for blob in (config, *blobs)]
    descriptors = [
        {"mediaType": LAYER, "digest": digest, "size": len(blob)}
        for digest, blob in zip(digests[1:], blobs, strict=True)
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digests[0],
            "size": len(config),
        },
        "layers": [*below, *descriptors],
    }
    return BuiltImage(
        manifest=json.dumps(manifest).encode(),
        media_type=OCI_MANIFEST,
        blobs={**(base.blobs if base is not None else {}), **dict(zip(digests, (config, *blobs), strict=True))},
        config_digest=digests[0],
        layer_digests=(*(one["digest"] for one in below), *digests[1:]),
        diff_ids=diff_ids,
        platform={"os": "linux", "architecture": "amd64"},
    )


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    needs("root", "overlay", "busybox")
    with stocked() as made:
        made.add("data", "1", built(BOTTOM, TOP))
        made.add("model", "1", artifact([("weights.bin", b"0123"), ("doc/read.me", b"read\n")]))
        yield made


@pytest.fixture(scope="module")
def data(registry: FakeRegistry) -> str:
    return f"{registry.name}/data:1"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry, data: str) -> Iterator[Node]:
    with node(tmp_path_factory.mktemp("images") / "n") as made:
        made.image = f"{registry.name}/busybox:1"
        for name in (made.image, data):
            made.client.pull(name)
        made.drop(made.run(made.image, ["true"])[0])
        yield made


def shown(here: Node, name: str, script: str, *, config: Any = None, **fields: Any) -> list[str]:
    """What `script` prints in a container that has image `name` at /vol."""
    config = config or here.pod_config()
    pod = here.client.run_pod(config)
    try:
        one = container("main", here.image, ["sh", "-c", script])
        one.mounts.add(container_path="/vol", readonly=True, image=pb.ImageSpec(image=name), **fields)
        made = here.client.create(pod, one, config)
        here.client.start(made)
        here.client.wait_exit(made)
        log = Path(config.log_directory) / "main.log"
        return messages(log) + messages(log, "stderr")
    finally:
        here.drop(pod)


def test_layers_are_merged_and_read_only(here: Node, data: str) -> None:
    before = here.held()
    table = subprocess.run(["cat", "/proc/self/mountinfo"], capture_output=True, check=True).stdout
    said = shown(here, data, "ls /vol/data; stat -c %u:%g /vol/data/one; touch /vol/x; grep ' /vol ' /proc/mounts")
    assert said[:4] == ["deep", "one", "three", "7:8"]
    assert any("Read-only file system" in line for line in said)
    options = next(line for line in said if line.startswith("overlay")).split()[3].split(",")
    assert {"ro", "nosuid", "nodev"} <= set(options)
    assert subprocess.run(["cat", "/proc/self/mountinfo"], capture_output=True, check=True).stdout == table
    here.settles(before)


def test_the_status_tells_which_image_a_mount_shows(here: Node, data: str, tmp_path: Path) -> None:
    """By id, as PullImage has answered it (KEP 5365), whatever name it was asked for by."""
    config = here.pod_config()
    pod = here.client.run_pod(config)
    one = container("main", here.image, ["sleep", "1000"])
    one.mounts.add(container_path="/host", host_path=str(tmp_path))
    for path, name in (("/data", data), ("/own", here.image)):
        one.mounts.add(container_path=path, readonly=True, image=pb.ImageSpec(image=name))
    made = here.client.create(pod, one, config)
    ids = {
        name: here.client.images.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=name))).image.id
        for name in (data, here.image)
    }
    told = {mount.container_path: mount.image.image_ref for mount in here.client.status(made).mounts}
    assert told == {"/host": "", "/data": ids[data], "/own": ids[here.image]}
    here.drop(pod)


def test_the_files_of_an_artifact(here: Node, registry: FakeRegistry) -> None:
    name = f"{registry.name}/model:1"
    here.client.pull(name)
    (listed,) = [one for one in here.client.list_images() if name in one.repo_tags]
    assert listed.spec.annotations["dev.ocid.artifact-type"] == "application/vnd.example.model"
    said = shown(here, listed.id, "cd /vol; find . -type f | sort; cat weights.bin doc/read.me; touch weights.bin")
    assert said[:3] == ["./doc/read.me", "./weights.bin", "0123read"] and "Read-only file system" in said[3]
    assert shown(here, name, "ls /vol", image_sub_path="doc") == ["read.me"]
    config = here.pod_config()
    pod = here.client.run_pod(config)
    try:
        with pytest.raises(grpc.RpcError, match="is an artifact .*no program to run"):
            here.client.create(pod, container("main", name, ["/weights.bin"]), config)
    finally:
        here.drop(pod)
    here.client.remove_image(name)


def test_options_of_the_request_count(here: Node, data: str) -> None:
    (line,) = shown(here, data, "grep ' /vol ' /proc/mounts", mount_options=["noexec", "suid", "noatime"])
    options = set(line.split()[3].split(","))
    assert {"ro", "noexec", "nodev", "noatime"} <= options and "nosuid" not in options


@pytest.mark.parametrize(("path", "expected"), [("data", ["deep", "one", "three"]), ("data/./deep", ["two"])])
def test_a_directory_of_an_image(here: Node, data: str, path: str, expected: list[str]) -> None:
    script = "ls /vol; grep -c ' /vol ' /proc/mounts; touch /vol/x"
    said = shown(here, data, script, image_sub_path=path)
    assert said[: len(expected) + 1] == [*expected, "1"] and "Read-only" in said[-1]


def test_s57_links_lead_nowhere_but_into_the_image(here: Node, data: str) -> None:
    assert shown(here, data, "ls /vol", image_sub_path="in") == ["two"]
    for link in ("out", "up"):  # /etc of the image, which it has not
        with pytest.raises(grpc.RpcError, match=r"X-mount.subdir.*no such file"):
            shown(here, data, "ls /vol", image_sub_path=link)
    with pytest.raises(grpc.RpcError, match="not a directory"):
        shown(here, data, "ls /vol", image_sub_path="data/one")
    for path in ("../etc", "/etc", "data/../../x"):
        with pytest.raises(grpc.RpcError, match="image_sub_path"):
            shown(here, data, "ls /vol", image_sub_path=path)


def test_in_a_user_namespace_its_files_are_the_containers(here: Node, data: str) -> None:
    script = "stat -c %u:%g /vol/data /vol/data/one; stat -c %u:%g /vol/suid; touch /vol/x"
    said = shown(here, data, script, config=mapped(here.pod_config()))
    assert said[:3] == ["0:0", "7:8", "0:0"] and "Read-only" in said[-1]
    assert shown(here, data, "stat -c %u /vol/one", config=mapped(here.pod_config(), FIRST + 65536),
                 image_sub_path="data") == ["7"]  # fmt: skip


def test_o39_an_image_that_is_mounted_stays_until_its_container_goes(here: Node, data: str) -> None:
    config = here.pod_config()
    pod = here.client.run_pod(config)
    one = container("main", here.image, ["sleep", "1000"])
    one.mounts.add(container_path="/vol", readonly=True, image=pb.ImageSpec(image=data))
    made = here.client.create(pod, one, config)
    here.client.start(made)
    here.client.remove_image(data)
    assert here.client.exec_sync(made, ["cat", "/vol/data/deep/two"])[1] == b"2\n"
    again = container("again", here.image, ["true"])
    again.mounts.add(container_path="/vol", readonly=True, image=pb.ImageSpec(image=data))
    with pytest.raises(grpc.RpcError, match="pull it first"):
        here.client.create(pod, again, config)
    here.client.pull(data)
    here.drop(pod)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host_path": "/tmp", "readonly": True}, "host_path: must be empty"),
        ({"readonly": False}, "readonly: a mount of an image is read-only"),
        ({"readonly": True, "propagation": pb.PROPAGATION_BIDIRECTIONAL}, "propagation"),
        ({"readonly": True, "mount_options": ["rw"]}, "mount_options: 'rw'"),
        ({"readonly": True, "image": pb.ImageSpec()}, "image: the name is empty"),
        ({"readonly": True, "image": pb.ImageSpec(image="no.such/image:1")}, "pull it first"),
    ],
)
def test_what_is_no_mount_of_an_image_is_refused_by_its_field(
    here: Node, data: str, fields: dict[str, Any], message: str
) -> None:
    before = here.held()
    config = here.pod_config()
    pod = here.client.run_pod(config)
    one = container("main", here.image, ["true"])
    one.mounts.add(container_path="/vol", **{"image": pb.ImageSpec(image=data), **fields})
    with pytest.raises(grpc.RpcError, match=message):
        here.client.create(pod, one, config)
    assert not here.client.list_containers()
    here.drop(pod)
    here.settles(before)
