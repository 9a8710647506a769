"""What bad input gets, over the real socket: one clear sentence with the cause and the right code, nothing left behind,
and the same call works once the cause is gone."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from conformance.cri_client import container
from cri.api import api_pb2 as pb
from tests.commands import prepared, said
from tests.e2e import Node, busybox, node, stocked
from tests.fakes.registry import Action, Cut, FakeRegistry, Hang, Reply, Spoil, Stall, build_image
from tests.support import SOON_S, eventually, needs

WORKS = ["sh", "-c", "exit 3"]


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with stocked() as made:
        yield made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    needs("root", "overlay")
    image, runtime = "stall_s = 1.0\nretries = 1", 'missing_host_paths = "refuse"'
    with node(tmp_path_factory.mktemp("bad"), image=image, runtime=runtime) as made:
        yield made


@pytest.fixture(scope="module")
def image(served: Node, registry: FakeRegistry) -> str:
    """A reference that is pulled, by a node that has run a container already."""
    reference = registry.add("ready", "1", busybox())
    served.client.pull(reference)
    pod, one, _ = served.run(reference, WORKS, network=True)
    assert served.client.wait_exit(one) == 3
    served.drop(pod)
    return reference


def refused(served: Node, call: Callable[[], object], code: StatusCode, *words: str) -> str:
    """Makes the call, which must fail with `code`, one sentence that has `words`, and nothing left."""
    before = served.held()
    with pytest.raises(grpc.RpcError) as caught:
        call()
    said = str(caught.value.details())  # type: ignore[attr-defined]
    assert caught.value.code() == code, said  # type: ignore[attr-defined]
    assert said and "\n" not in said and "Traceback" not in said, said
    assert all(word in said for word in words), said
    served.settles(before)
    return said


# ------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("reference", "word"),
    [
        ("", "empty"),
        ("UPPER/Case:1", "lower case"),
        ("busybox:1:2", "malformed"),
        ("HOST/busybox@sha256:zz", "digest"),
        ("two words", "malformed"),
        ("HOST/../escape", "malformed"),
        ("x" * 5000, "4096"),
    ],
)
def test_wrong_reference(served: Node, registry: FakeRegistry, reference: str, word: str) -> None:
    asked = registry.count("GET", "") + registry.count("HEAD", "")
    name = reference.replace("HOST", registry.name)
    refused(served, lambda: served.client.pull(name), StatusCode.INVALID_ARGUMENT, word)
    assert registry.count("GET", "") + registry.count("HEAD", "") == asked, "a wrong reference reaches no registry"


def test_unknown_image(served: Node, registry: FakeRegistry, image: str) -> None:
    name = f"{registry.name}/later:1"
    refused(served, lambda: served.client.pull(name), StatusCode.NOT_FOUND, name, "manifest unknown")
    config = served.pod_config()
    pod = served.client.run_pod(config)
    create = lambda: served.client.create(pod, container("one", name, WORKS), config)  # noqa: E731
    refused(served, create, StatusCode.NOT_FOUND, name, "pull it first")
    registry.add("later", "1", busybox())
    served.client.pull(name)
    assert create()
    served.drop(pod)


TROUBLE: list[tuple[str, str, Action, StatusCode, str]] = [
    ("403", "/v2/", Reply(403), StatusCode.PERMISSION_DENIED, "403"),
    ("404", "/v2/", Reply(404), StatusCode.NOT_FOUND, "404"),
    ("429", "/v2/", Reply(429, {"Retry-After": "0"}), StatusCode.UNAVAILABLE, "429"),
    ("500", "/v2/", Reply(500), StatusCode.UNAVAILABLE, "500"),
    ("blob-404", "/blobs/", Reply(404), StatusCode.NOT_FOUND, "404"),
    ("blob-500", "/blobs/", Reply(500), StatusCode.UNAVAILABLE, "500"),
    ("hangs", "/v2/", Hang(), StatusCode.UNAVAILABLE, "no answer in time"),
    ("truncates-manifest", "/manifests/", Cut(10), StatusCode.UNAVAILABLE, "ended before"),
    ("wrong-manifest", "/manifests/", Spoil(), StatusCode.DATA_LOSS, "sha256:"),
    # What a refused config leaves of layers that came beside it: tests/integration/test_imagestore_beside
    ("wrong-digest", "/blobs/LAYER", Spoil(), StatusCode.DATA_LOSS, "wrong content"),
]


@pytest.mark.parametrize(("case", "path", "action", "code", "word"), TROUBLE, ids=[one[0] for one in TROUBLE])
def test_registry_trouble(
    served: Node, registry: FakeRegistry, image: str, case: str, path: str, action: Action, code: StatusCode, word: str
) -> None:
    # A repository and an image of its own: nothing of it may be there from before.
    tar = build_image([{"bin/hello": case.encode()}])
    reference = registry.add(f"trouble-{case}", "1", tar)
    registry.rule("", path.replace("LAYER", tar.layer_digests[0]), action)
    try:
        refused(served, lambda: served.client.pull(reference), code, reference, word)
    finally:
        registry.heal()
    assert served.client.pull(reference) == tar.config_digest
    served.forget(reference)


def test_registry_wants_credentials(served: Node, registry: FakeRegistry, image: str) -> None:
    reference = registry.add("private", "1", build_image([{"a": b"private"}]))
    registry.basic = ("user", "secret-word")
    try:
        said = refused(served, lambda: served.client.pull(reference), StatusCode.PERMISSION_DENIED, "401", "log in")

        def pull(password: str) -> object:
            auth = pb.AuthConfig(username="user", password=password)
            request = pb.PullImageRequest(image=pb.ImageSpec(image=reference), auth=auth)
            return served.client.images.PullImage(request, timeout=SOON_S)

        said += refused(served, lambda: pull("wrong-word"), StatusCode.PERMISSION_DENIED, "401")
        assert "wrong-word" not in said
        assert pull("secret-word")
    finally:
        registry.basic = None
    assert "secret-word" not in served.log.read_text()
    served.forget(reference)


@pytest.mark.parametrize("action", [Cut(3000), Stall(3000)], ids=["truncated", "stalled"])
def test_o49_half_a_layer_is_resumed(served: Node, registry: FakeRegistry, image: str, action: Action) -> None:
    """What stays of it is hidden, and the next pull asks for the rest alone."""
    spread = bytes(range(256)) * 200
    made = build_image([{f"file{action}": spread}], compression="")
    reference = registry.add("half", "1", made)
    before = served.held()
    registry.rule("GET", f"/blobs/{made.layer_digests[0]}", action)
    try:
        with pytest.raises(grpc.RpcError) as caught:
            served.client.pull(reference)
    finally:
        registry.heal()
    assert caught.value.code() == StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    left = {one for one in served.held() - before if not one.endswith(".part")}
    assert not left
    seen = len(registry.seen)
    assert served.client.pull(reference) == made.config_digest
    ranges = [one.headers.get("Range", "") for one in registry.seen[seen:] if made.layer_digests[0] in one.path]
    assert any(one and one != "bytes=0-" for one in ranges), ranges
    served.forget(reference)
    served.settles(before)


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", device: tuple[int, int] = (0, 0)) -> bytes:
    """A tar of one entry, which tarfile would not read back without a warning."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.devmajor, info.devminor = kind, link, 0o755, *device
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(info)
    return out.getvalue()


def joined(*tars: bytes) -> bytes:
    """One tar of several: each without the two blocks of zeros (and padding) at its end."""
    return b"".join(tar.rstrip(b"\0").ljust(-(-len(tar.rstrip(b"\0")) // 512) * 512, b"\0") for tar in tars) + bytes(
        1024
    )


BAD_LAYERS = {
    "dotdot": (entry("../../escape"), "leaves the root"),
    "hard-link-out": (entry("a", tarfile.LNKTYPE, "../../etc/shadow"), "outside the root"),
    "hard-link-absolute": (entry("a", tarfile.LNKTYPE, "/etc/shadow"), "in no layer"),
    "device-number": (entry("a", tarfile.BLKTYPE, device=(4096, 1 << 20)), "out of range"),
    "garbage": (b"\1" * 5000, "tar header"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_s39_bad_layer(served: Node, registry: FakeRegistry, image: str, case: str) -> None:
    layer, word = BAD_LAYERS[case]
    shadow = Path("/etc/shadow").stat()
    reference = registry.add(f"bad-{case}", "1", build_image([layer]))
    refused(served, lambda: served.client.pull(reference), StatusCode.DATA_LOSS, reference, "unpack layer", word)
    after = Path("/etc/shadow").stat()
    assert (after.st_nlink, after.st_mode, after.st_mtime_ns) == (shadow.st_nlink, shadow.st_mode, shadow.st_mtime_ns)
    good = build_image([{"good": case.encode()}])
    registry.add(f"bad-{case}", "1", good)
    assert served.client.pull(reference) == good.config_digest
    served.forget(reference)


@pytest.mark.parametrize("target", ["{}", "../../../../../../../../../../..{}"], ids=["absolute", "relative"])
def test_s39_links_out_of_a_layer_stay_inside(
    served: Node, registry: FakeRegistry, image: str, tmp_path: Path, target: str
) -> None:
    """Such links are legitimate; what follows them is not led out of the layer."""
    layer = joined(entry("way", tarfile.SYMTYPE, target.format(tmp_path)), entry("way/escaped"))
    reference = registry.add("links", "1", build_image([layer]))
    before = served.held()
    served.client.pull(reference)
    assert not list(tmp_path.iterdir())
    served.forget(reference)
    served.settles(before)


def test_device_in_a_layer_gives_no_device(served: Node, registry: FakeRegistry, image: str) -> None:
    """A layer may hold device nodes, as many do; a container cannot open one that it was not given."""
    good = busybox()
    tar = gzip.decompress(good.blobs[good.layer_digests[0]])
    memory = entry("evil", tarfile.CHRTYPE, device=(1, 1))
    reference = registry.add("device", "1", build_image([tar, memory]))
    before = served.held()
    served.client.pull(reference)
    pod, one, log = served.run(reference, ["/bin/dd", "if=/evil", "of=/dev/null", "count=1"])
    assert served.client.wait_exit(one) == 1
    assert "Operation not permitted" in log.read_text()
    served.drop(pod)
    served.forget(reference)
    served.settles(before)


def test_wrong_diff_id(served: Node, registry: FakeRegistry, image: str) -> None:
    def spoil(config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]

    reference = registry.add("diff", "1", build_image([{"a": b"diff"}], edit_config=spoil))
    refused(served, lambda: served.client.pull(reference), StatusCode.DATA_LOSS, "diff id", "0" * 64)
    registry.add("diff", "1", build_image([{"a": b"diff"}]))
    served.client.pull(reference)
    served.forget(reference)


# --------------------------------------------------------------------------------------------------------- full disk


def test_full_disk(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> None:
    """The root is a filesystem of 16 MiB with a file that leaves no room, until that goes."""
    directory = tmp_path_factory.mktemp("full")
    with disk(directory, "tmpfs") as root:
        with node(directory / "node", root=root) as made:
            reference = registry.add("big", "1", busybox())
            filler = root / "filler"
            with filler.open("wb") as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            with filler.open("r+b") as file:
                file.truncate(filler.stat().st_size - (1 << 20))
            with pytest.raises(grpc.RpcError) as caught:
                made.client.pull(reference)
            said = str(caught.value.details())  # type: ignore[attr-defined]
            assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED, said  # type: ignore[attr-defined]
            assert "ENOSPC" in said and reference in said
            assert not made.client.list_images()
            assert not list((root / "snapshots/layers").iterdir())
            assert not [one for one in made.held() if one.startswith("record image")]
            filler.unlink()
            made.client.pull(reference)
            pod, one, _ = made.run(reference, WORKS)
            assert made.client.wait_exit(one) == 3
            made.drop(pod)


EATER = """
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    try:
        os.write(file, bytes(4096))
    except OSError:
        pass
"""


@contextmanager
def disk(directory: Path, kind: str) -> Iterator[Path]:
    """A small filesystem of its own. It is gone afterwards, whatever happens."""
    root = directory / "disk"
    root.mkdir()
    if kind == "ext4":
        with (directory / "blocks").open("wb") as file:
            file.truncate(24 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", directory / "blocks"], check=True)
        subprocess.run(["mount", "-o", "loop", directory / "blocks", root], check=True)
    else:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", root], check=True)
    try:
        yield root
    finally:
        if subprocess.run(["umount", root], check=False).returncode:
            subprocess.run(["umount", "-l", root], check=True)
            raise AssertionError(f"something had files open below {root}")


@contextmanager
def eating(root: Path) -> Iterator[None]:
    """Somebody who takes each block that is free the moment it is."""
    eater = subprocess.Popen([sys.executable, "-c", EATER, root / "eaten"])
    try:
        eventually(lambda: os.statvfs(root).f_bavail == 0, what="the disk to fill")
        yield
    finally:
        eater.kill()
        eater.wait()
        (root / "eaten").unlink()


@pytest.mark.parametrize("served", [True, False], ids=["served", "alone"])
def test_what_fills_the_disk_is_stopped_and_removed(
    tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry, served: bool
) -> None:
    """Its log takes the last block, and would take each that is freed while the commands work."""
    directory = tmp_path_factory.mktemp("filled")
    with disk(directory, "tmpfs") as root, prepared(served, directory / "node", registry, root) as made:
        said(made, "run", "-d", "--name", "loud", made.image, "yes", "x" * 100)
        eventually(lambda: os.statvfs(root).f_bavail == 0, what="the disk to fill")
        assert "loud" in said(made, "ps")
        assert said(made, "exec", "loud", "echo", "in").strip() == "in"
        said(made, "stop", "-t", "0", "loud")
        assert os.statvfs(root).f_bavail * 4096 < 1 << 20
        said(made, "rm", "loud")
        assert "loud" not in said(made, "ps", "-a")
        assert os.statvfs(root).f_bavail * 4096 > 1 << 20
        said(made, "run", "--rm", made.image, "true")


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_disk_whose_every_free_block_is_taken_at_once(
    tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry, kind: str
) -> None:
    """One command after the other opens the database and closes it, then a daemon, and none sets a block free that it
    needs."""
    directory = tmp_path_factory.mktemp("eaten")
    with disk(directory, kind) as root, prepared(False, directory / "node", registry, root) as made:
        said(made, "run", "-d", "--name", "one", made.image, "sleep", "1000")
        said(made, "run", "-d", "--name", "two", made.image, "sleep", "1000")
        with eating(root):
            for _ in range(3):
                assert "one" in said(made, "ps")
            said(made, "stop", "-t", "0", "one")
            said(made, "rm", "one")
            made.start()
            try:
                assert "two" in said(made, "ps")
                said(made, "rm", "-f", "two")
            finally:
                made.end()
            assert said(made, "ps", "-a", "-q") == ""
        said(made, "run", "--rm", made.image, "true")


# --------------------------------------------------------------------------------------------------------- containers


def _user(config: Any) -> None:
    config.linux.security_context.run_as_user.value = -1


def _username(config: Any) -> None:
    config.linux.security_context.run_as_username = "nosuch"


def _capability(config: Any) -> None:
    config.linux.security_context.capabilities.add_capabilities.append("NOPE")


def _seccomp(config: Any) -> None:
    config.linux.security_context.seccomp.profile_type = pb.SecurityProfile.Localhost
    config.linux.security_context.seccomp.localhost_ref = "/no/such/profile"


WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "name": (lambda c: c.metadata.Clear(), "metadata.name"),
    "log_path": (lambda c: setattr(c, "log_path", "../../out"), "log_path"),
    "user": (_user, "run_as_user"),
    "username": (_username, "nosuch"),
    "capability": (_capability, "NOPE"),
    "seccomp": (_seccomp, "/no/such/profile"),
    "working_dir": (lambda c: setattr(c, "working_dir", "relative"), "working_dir"),
    "env": (lambda c: c.envs.add(key="A=B"), "A=B"),
    "mount-source": (lambda c: c.mounts.add(host_path="/no/such", container_path="/x"), "/no/such"),
    "s02-mount-on-proc": (lambda c: c.mounts.add(host_path="/tmp", container_path="/proc"), "/proc"),
    "device": (lambda c: c.devices.add(host_path="/dev/nope", container_path="/dev/nope"), "/dev/nope"),
    "memory": (lambda c: setattr(c.linux.resources, "memory_limit_in_bytes", -5), "memory_limit_in_bytes"),
    "cpu_quota": (lambda c: setattr(c.linux.resources, "cpu_quota", 1), "cpu.quota"),
    "cpuset": (lambda c: setattr(c.linux.resources, "cpuset_cpus", "0-9999"), "0-9999"),
    "oom_score_adj": (lambda c: setattr(c.linux.resources, "oom_score_adj", 5000), "oom_score_adj"),
    "command-unknown": (lambda c: c.command.__setitem__(0, "nosuch"), "not found in $PATH"),
    "command-missing": (lambda c: c.command.__setitem__(0, "/no/such"), "no such file"),
    "command-not-executable": (lambda c: c.command.__setitem__(0, "/etc/passwd"), "permission denied"),
    "command-directory": (lambda c: c.command.__setitem__(0, "/etc"), "directory"),
}


@pytest.fixture(scope="module")
def pod(served: Node, image: str) -> Iterator[tuple[str, Any]]:
    config = served.pod_config(network=True)
    made = served.client.run_pod(config)
    yield made, config
    served.drop(made)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_container_config(served: Node, image: str, pod: tuple[str, Any], case: str) -> None:
    spoil, word = WRONG[case]
    config = container("one", image, WORKS)
    spoil(config)
    refused(served, lambda: served.client.create(pod[0], config, pod[1]), StatusCode.INVALID_ARGUMENT, word)
    right = served.client.create(pod[0], container("one", image, WORKS), pod[1])
    served.client.start(right)
    assert served.client.wait_exit(right) == 3
    served.client.remove(right)


def _hostname(config: Any) -> None:
    config.hostname = "two words/../"


def _sysctl(config: Any) -> None:
    config.linux.sysctls["kernel.core_pattern"] = "core"


WRONG_PODS: dict[str, tuple[Callable[[Any], object], str]] = {
    "name": (lambda c: setattr(c.metadata, "name", "../up"), "metadata.name"),
    "hostname": (_hostname, "hostname"),
    "log_directory": (lambda c: setattr(c, "log_directory", "../up"), "log_directory"),
    "s59-sysctl": (_sysctl, "kernel.core_pattern"),
    "s19-cgroup": (lambda c: setattr(c.linux, "cgroup_parent", "/../up"), "cgroup_parent"),
    "port": (lambda c: c.port_mappings.add(host_port=70000, container_port=80), "65535"),
}


@pytest.mark.parametrize("case", WRONG_PODS)
def test_wrong_pod_config(served: Node, image: str, case: str) -> None:
    spoil, word = WRONG_PODS[case]
    config = served.pod_config(network=True)
    spoil(config)
    refused(served, lambda: served.client.run_pod(config), StatusCode.INVALID_ARGUMENT, word)
    served.drop(served.client.run_pod(served.pod_config(network=True)))


def test_wrong_ids_and_names(served: Node, image: str, pod: tuple[str, Any]) -> None:
    client = served.client
    refused(served, lambda: client.create("none", container("one", image), pod[1]), StatusCode.NOT_FOUND, "none")
    refused(served, lambda: client.start("none"), StatusCode.NOT_FOUND, "none")
    refused(served, lambda: client.exec_sync("none", ["true"]), StatusCode.NOT_FOUND, "none")
    refused(served, lambda: client.run_pod(pod[1]), StatusCode.ALREADY_EXISTS, pod[0])
    handler = pb.RunPodSandboxRequest(config=served.pod_config(), runtime_handler="nope")
    refused(served, lambda: client.runtime.RunPodSandbox(handler), StatusCode.INVALID_ARGUMENT, "nope", "native")
    # To stop or remove what is not there is done already.
    client.stop("none")
    client.stop_pod("none")
    client.remove("none")
    client.remove_pod("none")


def test_no_network_is_said_and_leaves_nothing(served: Node, image: str) -> None:
    """A network list that cannot be used: the pod does not come up, and does once it is mended."""
    broken = served.directory / "net.d/00-broken.conflist"
    broken.write_text('{"cniVersion": "1.0.0", "name": "broken", "plugins": [{"type": "no-such-plugin"}]}')
    config = served.pod_config(network=True)
    try:
        before = served.held()
        with pytest.raises(grpc.RpcError) as caught:
            served.client.run_pod(config)
        assert "no-such-plugin" in str(caught.value.details())  # type: ignore[attr-defined]
        served.settles(before)
    finally:
        broken.unlink()
    served.drop(eventually(lambda: served.client.run_pod(config)))


def test_container_that_dies_at_once(served: Node, image: str, pod: tuple[str, Any]) -> None:
    """Its end is kept with code, reason and times, and nothing of it runs or is mounted."""
    before = served.held()
    one = served.client.create(pod[0], container("short", image, ["sh", "-c", "echo last words; exit 139"]), pod[1])
    served.client.start(one)
    assert served.client.wait_exit(one) == 139
    status = served.client.status(one)
    assert status.reason == "Error" and status.created_at <= status.started_at <= status.finished_at
    assert "last words" in Path(status.log_path).read_text()
    refused(served, lambda: served.client.exec_sync(one, ["true"]), StatusCode.FAILED_PRECONDITION, one[:12])
    refused(served, lambda: served.client.start(one), StatusCode.FAILED_PRECONDITION, one[:12])
    assert not [line for line in served.held() - before if line.startswith(("mount", "process"))]
    served.client.remove(one)
    served.settles(before)
