"""Images at the command line, without a daemon and through one: load, save, tag, copy, inspect, gc, doctor, events."""

from __future__ import annotations

import gzip
import json
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.leaks import Machine
from tests import warm
from tests.e2e import Node, node, retired
from tests.fakes.registry import OCI_INDEX, FakeRegistry, Reply, build_image, build_index, sha256, write_layout
from tests.support import eventually, needs

COMMAND_S = 60.0


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


def _image(directory: Path) -> str:
    return f'auth_files = ["/dev/null"]\nregistries_conf = "{directory}/registries.conf"\nunpack_idle_s = 0.2'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    needs("root", "overlay")
    directory = tmp_path_factory.mktemp("images")
    with node(directory, image=_image(directory)) as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    needs("root", "overlay")
    directory = tmp_path_factory.mktemp("alone")
    made, before = Node(directory, image=_image(directory)), Machine.now()
    try:
        yield made
    finally:
        retired(made, before)


@pytest.fixture(autouse=True)
def unpackers_end(served: Node) -> Iterator[None]:
    """Those of a daemon outlive the pull that they were started for."""
    yield
    if served.process is not None:
        children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children")
        eventually(lambda: not any("ocid-unpack" in _name(pid) for pid in children.read_text().split()), 10, "end")


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def ocid(cli: Node, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return warm.run([*cli.words, *words], input=stdin, timeout=COMMAND_S)


def said(cli: Node, *words: str, code: int = 0, stdin: bytes = b"") -> bytes:
    done = ocid(cli, *words, stdin=stdin)
    assert done.returncode == code, f"{words}: {done.returncode}, not {code}: {done.stderr!r} {done.stdout!r}"
    return done.stdout


def test_an_image_without_layers_runs_what_is_mounted_into_it(
    alone: Node, registry: FakeRegistry, tmp_path: Path
) -> None:
    name = registry.add(
        "scratch", "1", build_image([], config={"Env": ["PATH=/bin"], "Cmd": ["/bin/busybox", "ls", "/"]})
    )
    said(alone, "pull", name)
    form = "{{.Repository}}:{{.Tag}} {{.Digest}} {{json .Pinned}}"
    built = registry.manifests[("scratch", "1")][0]
    assert said(alone, "images", "--format", form).decode().splitlines() == [f"{name} {sha256(built)} false"]
    assert said(alone, "inspect", "-f", "{{.status.id}}", name).startswith(b"sha256:")
    mounts = [word for path in ("/bin", "/lib", "/lib64", "/usr") for word in ("-v", f"{path}:{path}:ro")]
    listed = said(alone, "run", "--rm", "--net=none", *mounts, name).decode().split()
    assert {"bin", "proc", "dev"} <= set(listed) and "root" not in listed
    said(alone, "save", "-o", str(tmp_path / "archive"), name)
    said(alone, "rmi", name)
    assert name.encode() in said(alone, "load", "-i", str(tmp_path / "archive"))
    assert b"everything is as it is recorded" in said(alone, "doctor")
    assert name.encode() in said(alone, "inspect", name)
    said(alone, "verify", "--deep", name)
    said(alone, "rmi", name)


def names(cli: Node) -> set[str]:
    listed = json.loads(said(cli, "images", "--format", "json"))
    return {tag for image in listed for tag in image["tags"]}


def test_tag_save_rmi_load(served: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    """What was saved comes back as it was: by a file, by a pipe, and compressed."""
    image = build_image([{"saved": b"1"}])
    reference = registry.add("saved", "1", image)
    said(served, "pull", reference)
    said(served, "tag", reference, "localhost/mine:2", "mine:3")
    assert {reference, "localhost/mine:2", "docker.io/library/mine:3"} <= names(served)
    file = tmp_path / "saved.tar"
    said(served, "save", "-o", str(file), "localhost/mine:2", "mine:3")
    piped = said(served, "save", "localhost/mine:2")
    said(served, "save", "--format", "oci-archive", "-o", str(tmp_path / "oci.tar"), reference)
    said(served, "rmi", reference, "localhost/mine:2", "mine:3")
    said(served, "gc")
    assert reference not in names(served)
    assert image.config_digest in said(served, "load", "-i", str(file)).decode()
    assert {"localhost/mine:2", "docker.io/library/mine:3"} <= names(served)
    said(served, "rmi", "localhost/mine:2", "mine:3")
    said(served, "load", stdin=gzip.compress(piped))
    assert "localhost/mine:2" in names(served)
    said(served, "rmi", "localhost/mine:2")
    with open(file, "rb") as archive:  # a pipe is copied, a file that is stdin is not
        subprocess.run([*served.words, "load"], stdin=archive, capture_output=True, timeout=COMMAND_S, check=True)
    assert "localhost/mine:2" in names(served)
    said(served, "load", "-q", "-i", str(tmp_path / "oci.tar"))
    assert reference in names(served)
    said(served, "rmi", reference, "localhost/mine:2")
    bad = ocid(served, "load", stdin=b"no archive at all" * 100)
    assert bad.returncode == 125 and len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize("form", ["archive", "compressed", "layout"])
def test_what_the_daemon_cannot_open_is_loaded(served: Node, tmp_path: Path, form: str) -> None:
    """The file lies in a mount namespace of the command's own; the daemon is handed what is open there."""
    hidden, outside = tmp_path / "hidden", tmp_path / "outside"
    for directory in (hidden, outside):
        directory.mkdir()
    write_layout(outside / "layout", {"v1": build_image([{"hidden": form.encode()}])})
    made, source = {
        "layout": (f"cp -r {outside}/layout {hidden}/it", f"{hidden}/it"),
        "archive": (f"tar cf {hidden}/it.tar -C {outside}/layout .", f"{hidden}/it.tar"),
        "compressed": (f"tar czf {hidden}/it.tar -C {outside}/layout .", f"{hidden}/it.tar"),
    }[form]
    command = " ".join([*served.words, "load", "-q", "-i", source])
    script = f"mount -t tmpfs hidden {hidden} && {made} && {command}"
    done = subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, timeout=COMMAND_S, check=False)
    assert done.returncode == 0, done.stderr
    assert list(hidden.iterdir()) == [] and "localhost/it:v1" in names(served)
    said(served, "rmi", "localhost/it:v1")


def test_without_a_daemon(alone: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    """The same calls in the command's own process. Each starts all parts: a few are enough."""
    reference = registry.add("alone", "1", build_image([{"alone": b"1"}]))
    said(alone, "pull", reference)
    said(alone, "tag", reference, "localhost/alone:2")
    said(alone, "save", "-o", str(tmp_path / "alone.tar"), "localhost/alone:2")
    said(alone, "rmi", "localhost/alone:2")
    said(alone, "load", "-i", str(tmp_path / "alone.tar"))
    assert "localhost/alone:2" in names(alone)


def test_copy_from_and_to_the_store(served: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    """A Docker manifest leaves the store as it came: by its own digest, not as the twin that the layout shows."""
    image = build_image([{"copied": b"1"}], docker=True)
    reference = registry.add("copied", "1", image)
    said(served, "pull", reference)
    pushed = said(served, "copy", f"ocid:{reference}", f"docker://{registry.name}/pushed:1").decode().strip()
    assert pushed == image.digest and registry.manifests[("pushed", "1")][0] == image.manifest
    digests = tmp_path / "digest"
    said(served, "copy", "--digestfile", str(digests), f"docker://{reference}", f"oci:{tmp_path}/layout:x")
    assert (
        said(served, "copy", f"oci:{tmp_path}/layout:x", "ocid:localhost/back:1").decode().strip()
        == digests.read_text()
    )
    assert "localhost/back:1" in names(served)
    said(served, "rmi", reference, "localhost/back:1")
    wrong = ocid(served, "copy", reference, "oci:x")
    assert wrong.returncode == 125 and b"docker://" in wrong.stderr


def test_inspect_without_pulling(served: Node, registry: FakeRegistry) -> None:
    image = build_image([{"seen": b"1"}], config={"Env": ["A=b"], "Labels": {"l": "v"}})
    reference = registry.add("seen", "1", image)
    assert said(served, "manifest", "inspect", reference) == image.manifest
    told = json.loads(said(served, "inspect", f"docker://{reference}"))
    theirs = json.loads(
        subprocess.run(
            ["skopeo", "inspect", "--no-tags", "--tls-verify=false", f"docker://{reference}"],
            capture_output=True,
            check=True,
        ).stdout
    )
    for key in ("Name", "Digest", "Labels", "Architecture", "Os", "Layers", "Env"):
        assert told[key] == theirs[key]
    registry.rule("GET", "/referrers/", Reply(404))
    assert json.loads(said(served, "manifest", "referrers", reference)) == []
    registry.heal()
    assert registry.count("GET", f"/blobs/{image.layer_digests[0]}") == 0
    assert reference not in names(served)


def test_what_images_take_and_share(served: Node, registry: FakeRegistry) -> None:
    base = {"base": os.urandom(100_000)}
    for name in ("left", "right"):
        said(served, "pull", registry.add(name, "1", build_image([base, {name: b"1"}])))
    found = json.loads(said(served, "images", "--disk", "--format", "json"))
    assert found["bytes_unshared"] - found["bytes"] > 200_000
    listing, last = said(served, "images", "--disk").decode().rstrip().rsplit("\n", 1)
    assert "OWN" in listing and last.startswith(f"{len(found['images'])} images take ")
    layers = int(subprocess.run(["du", "-s", "-B1", served.root / "snapshots/layers"], capture_output=True, check=True)
                 .stdout.split()[0])  # fmt: skip
    blobs = sum(path.stat().st_blocks * 512 for path in (served.root / "images/blobs/sha256").iterdir())
    assert found["bytes"] == blobs + layers - os.lstat(served.root / "snapshots/layers").st_blocks * 512


def test_gc_tells_what_and_why(served: Node, registry: FakeRegistry) -> None:
    image = build_image([{"garbage": b"1"}])
    blob = served.root / "images/blobs/sha256" / ("0" * 63 + "1")
    said(served, "gc")
    blob.write_bytes(b"x" * 5000)
    planned = json.loads(said(served, "gc", "--dry-run", "--format", "json"))
    assert [(item["kind"], item["name"], item["why"]) for item in planned] == [
        ("blob", f"sha256:{blob.name}", "no image names it")
    ]
    assert planned[0]["bytes"] >= 5000 and blob.exists()
    assert b"1 things" in said(served, "gc") and not blob.exists()
    reference = registry.add("garbage", "1", image)
    said(served, "pull", reference)
    assert json.loads(said(served, "gc", "--dry-run", "--format", "json")) == []
    said(served, "rmi", reference)


def test_doctor_finds_and_repairs(served: Node, registry: FakeRegistry) -> None:
    image = build_image([{"sick": b"1" * 100}, {"well": b"2"}])
    reference = registry.add("sick", "1", image)
    said(served, "pull", reference)
    assert b"everything is as it is recorded" in said(served, "doctor")
    blob = served.root / "images/blobs/sha256" / image.layer_digests[0][7:]
    data = bytearray(blob.read_bytes())
    data[20] ^= 1
    blob.write_bytes(data)
    (found,) = (served.root / "snapshots/layers").glob("*/fs/well")
    found.unlink()
    problems = json.loads(said(served, "doctor", "--format", "json", code=1))["problems"]
    assert {problem["kind"] for problem in problems} == {"blob", "layer"}
    assert blob.read_bytes() == data, "looking changed something"
    answer = json.loads(said(served, "doctor", "--repair", "--format", "json"))
    assert answer["left"] == []
    assert b"everything is as it is recorded" in said(served, "doctor")
    (found,) = (served.root / "snapshots/layers").glob("*/fs/well")
    assert found.read_bytes() == b"2"
    # What only a look into the files tells.
    found.write_bytes(b"3")
    assert b"everything is as it is recorded" in said(served, "doctor")
    assert b"well: has other content" in said(served, "doctor", "--deep", code=1)
    assert found.read_bytes() == b"3", "looking changed something"
    assert b"repaired" in said(served, "doctor", "--deep", "--repair")
    (found,) = (served.root / "snapshots/layers").glob("*/fs/well")
    assert found.read_bytes() == b"2"
    assert b"everything is as it is recorded" in said(served, "doctor", "--deep")
    said(served, "rmi", reference)


def test_all_platforms(served: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    """Kept by a pull, saved and copied as they came. Where one platform is here, that is not passed off as all."""
    images = [build_image([{"it": name.encode()}], architecture=name) for name in ("amd64", "arm64")]
    for image in images:
        registry.add("wide", image.platform["architecture"], image)
    index = build_index(images)
    reference = registry.put("wide", "1", index, OCI_INDEX)
    said(served, "pull", reference)
    refused = ocid(served, "copy", "--all", f"ocid:{reference}", f"oci:{tmp_path}/part")
    assert refused.returncode == 125 and b"--all-platforms" in refused.stderr
    said(served, "pull", "--all-platforms", reference)
    assert said(served, "copy", "--all", f"ocid:{reference}", f"oci:{tmp_path}/all").decode().strip() == sha256(index)
    names = {f"sha256:{path.name}" for path in (tmp_path / "all/blobs/sha256").iterdir()}
    assert names == {sha256(index), *(digest for image in images for digest in (image.digest, *image.blobs))}
    file = tmp_path / "all.tar"
    said(served, "save", "--all-platforms", "--format", "oci-archive", "-o", str(file), reference)
    assert said(served, "copy", "--all", f"oci-archive:{file}", f"oci:{tmp_path}/again").decode().strip() == sha256(
        index
    )
    said(served, "save", "--all-platforms", "-o", str(file), reference, code=125)
    said(served, "rmi", reference)


def test_another_platform(served: Node, registry: FakeRegistry) -> None:
    """Over the socket, and of a name that is here already; pushed, it is what it was."""
    images = [build_image([{"it": name.encode()}], architecture=name) for name in ("amd64", "arm64")]
    for image in images:
        registry.add("other", image.platform["architecture"], image)
    reference = registry.put("other", "1", build_index(images), OCI_INDEX)
    for options, wanted in ((("--platform", "linux/arm64"), images[1]), ((), images[0])):
        assert said(served, "pull", *options, reference).decode().strip() == wanted.config_digest
        info = json.loads(said(served, "inspect", reference))[0]["info"]
        assert info["imageSpec"]["architecture"] == wanted.platform["architecture"]
        assert said(served, "push", reference, f"{registry.name}/pushed/other:1").decode().strip() == wanted.digest
    refused = ocid(served, "pull", "--platform", "linux", reference)
    assert refused.returncode == 125 and b"expected os/architecture" in refused.stderr
    said(served, "rmi", reference)


def test_events(served: Node, alone: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    refused = ocid(alone, "events")
    assert refused.returncode == 125 and b"no daemon" in refused.stderr
    image = build_image([{"events": b"1"}])
    reference = registry.add("events", "1", image)
    watching = warm.Command([*served.words, "events", "--format", "json"], stdout=subprocess.PIPE)
    try:
        assert watching.stdout is not None
        data = b""
        for _ in range(100):  # a watcher that is not there yet misses the first pulls
            said(served, "pull", reference)
            said(served, "rmi", reference)
            said(served, "gc")
            while select.select([watching.stdout], [], [], 0.2)[0]:
                data += os.read(watching.stdout.fileno(), 1 << 16)
            if b'"done"' in data:
                break
        steps = list(map(json.loads, data.splitlines()))
        assert {step["kind"] for step in steps} == {"pull"}
        assert {step["image"] for step in steps} == {reference}
        assert "done" in {step["phase"] for step in steps}
        write_layout(tmp_path / "layout", {"v1": image})
        said(served, "load", "-i", str(tmp_path / "layout"))
        data = b""
        while b'"done"' not in data:
            assert select.select([watching.stdout], [], [], COMMAND_S)[0]
            data += os.read(watching.stdout.fileno(), 1 << 16)
        assert {json.loads(line)["image"] for line in data.splitlines()} == {"v1"}
        said(served, "rmi", "localhost/layout:v1")
    finally:
        watching.kill()
        watching.wait()
