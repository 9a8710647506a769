"""What ocid must do as skopeo and umoci do it. A case is a function of the bench; its name is what is compared."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from conformance.image_lane.bench import PASSWORD, Bench, CaseFailed, holds, same
from conformance.image_lane.trees import MTIME, Listing, listing, merged
from conformance.images import layouts

Case = Callable[[Bench], None]


def _layout(bench: Bench, name: str) -> str:
    """One of the test images, as a place. All layers compressed with gzip, by ocid: the peers compress what is plain,
    each in its own way, and neither umoci nor docker's archives know zstd."""
    prepared = f"oci:{bench.directory}/prepared:{name}"
    if not (bench.directory / "prepared" / f".{name}").exists():
        recipe = {"multi": "busybox"}.get(name, name)
        bench.ocid("copy", "--all", "--compress", "gzip", f"oci:{layouts([recipe])[0]}:{name}:1", prepared)
        (bench.directory / "prepared" / f".{name}").touch()
    return prepared


def pushed(bench: Bench, name: str, *options: str) -> str:
    """A test image in the registry, put there by skopeo."""
    place = bench.docker(f"theirs/{name}:1")
    bench.skopeo("copy", *options, _layout(bench, name), place)
    return place


def push(bench: Bench) -> None:
    """A layout is pushed by both: the same digest, and each reads what the other pushed."""
    for name in ("busybox", "layers", "nginx"):
        theirs, ours = pushed(bench, name), bench.docker(f"ours/{name}:1")
        digest = bench.ocid("copy", _layout(bench, name), ours).strip()
        same(f"{name}: digest", digest, bench.digest(theirs))
        same(f"{name}: what skopeo reads of ours", bench.raw(ours), bench.raw(theirs))
        same(f"{name}: what ocid reads of theirs", bench.ocid("manifest", "inspect", theirs).encode(), bench.raw(ours))


def mount(bench: Bench) -> None:
    """Within the registry: no blob is sent a second time, and the digest stays."""
    source = pushed(bench, "layers")
    uploads = bench.directory / "registry" / "storage/docker/registry/v2/repositories/mounted/layers/_uploads"
    digest = bench.ocid("copy", source, bench.docker("mounted/layers:1")).strip()
    same("digest", digest, bench.digest(source))
    holds("an upload was left open", not uploads.exists() or not any(uploads.iterdir()))


def all_platforms(bench: Bench) -> None:
    """An index with all that it names, byte by byte."""
    theirs, ours = pushed(bench, "multi", "--all"), bench.docker("ours/multi:1")
    bench.ocid("copy", "--all", _layout(bench, "multi"), ours)
    same("index", bench.raw(ours), bench.raw(theirs))
    for child in json.loads(bench.raw(theirs))["manifests"]:
        for place in ("ours", "theirs"):
            bench.raw(bench.docker(f"{place}/multi@{child['digest']}"))


def one_platform(bench: Bench) -> None:
    """Of an index the one that was asked for, and by default this machine's."""
    source, directory = pushed(bench, "multi", "--all"), bench.fresh("one_platform")
    bench.ocid("copy", "--platform", "linux/arm64", source, f"dir:{directory}/ours")
    config = json.loads((directory / "ours" / "manifest.json").read_bytes())["config"]["digest"]
    found = json.loads((directory / "ours" / config.removeprefix("sha256:")).read_bytes())
    same("architecture", found["architecture"], "arm64")
    bench.ocid("copy", source, f"dir:{directory}/default")
    bench.skopeo("copy", source, f"dir:{directory}/their-default")
    same("default", files(directory / "default"), files(directory / "their-default"))


def to_layout(bench: Bench) -> None:
    """Both write the same layout, into an empty one and beside another image."""
    directory = bench.fresh("to_layout")
    for name in ("busybox", "layers"):
        source = pushed(bench, name)
        bench.ocid("copy", source, f"oci:{directory}/ours:{name}")
        bench.skopeo("copy", source, f"oci:{directory}/theirs:{name}")
    same("blobs", files(directory / "ours/blobs"), files(directory / "theirs/blobs"))
    entries = [json.loads((directory / who / "index.json").read_bytes())["manifests"] for who in ("ours", "theirs")]
    key = lambda entry: str(entry["annotations"])  # noqa: E731
    same("index.json", sorted(entries[0], key=key), sorted(entries[1], key=key))
    for name in ("busybox", "layers"):
        same(f"{name} read by skopeo", bench.digest(f"oci:{directory}/ours:{name}"), bench.digest(_layout(bench, name)))
        bench.ocid("inspect", f"oci:{directory}/theirs:{name}")


def to_directory(bench: Bench) -> None:
    """`dir:` is byte by byte the same, also with all platforms."""
    directory = bench.fresh("to_directory")
    for name, option in (("layers", ()), ("multi", ("--all",))):
        source = pushed(bench, name, *option)
        bench.ocid("copy", *option, source, f"dir:{directory}/ours-{name}")
        bench.skopeo("copy", *option, source, f"dir:{directory}/theirs-{name}")
        same(name, files(directory / f"ours-{name}"), files(directory / f"theirs-{name}"))
        back = bench.docker(f"back/{name}:1")
        bench.ocid("copy", *option, f"dir:{directory}/theirs-{name}", back)
        same(f"{name} and back", bench.raw(back), bench.raw(source))


def archives(bench: Bench) -> None:
    """Each reads the other's archives: the same config, the same layers."""
    directory = bench.fresh("archives")
    for name in ("nginx", "layers"):
        source = pushed(bench, name)
        for kind, tag in (("oci-archive", "x"), ("docker-archive", "docker.io/library/x:1")):
            ours, theirs = f"{kind}:{directory}/ours-{name}:{tag}", f"{kind}:{directory}/theirs-{name}:{tag}"
            for file in (directory / f"ours-{name}", directory / f"theirs-{name}"):
                file.unlink(missing_ok=True)
            bench.ocid("copy", source, ours)
            bench.skopeo("copy", source, theirs)
            read = [json.loads(bench.raw(place)) for place in (ours, theirs)]
            same(f"{name} in {kind}", _essence(read[0]), _essence(read[1]))
            same(
                f"{name} in {kind}, read by ocid",
                _essence(json.loads(bench.ocid("manifest", "inspect", theirs))),
                _essence(json.loads(bench.ocid("manifest", "inspect", ours))),
            )


def conversion(bench: Bench) -> None:
    """Docker's schema 2 from OCI and back: the same blobs under the other media types."""
    source = pushed(bench, "busybox")
    for ours, theirs in (("docker", "v2s2"), ("oci", "oci")):
        bench.ocid("copy", "--format", ours, source, bench.docker(f"ours/{theirs}:1"))
        bench.skopeo("copy", f"--format={theirs}", source, bench.docker(f"theirs/{theirs}:1"))
        made = [json.loads(bench.raw(bench.docker(f"{who}/{theirs}:1"))) for who in ("ours", "theirs")]
        same("media type", made[0]["mediaType"], made[1]["mediaType"])
        same("layers", made[0]["layers"], made[1]["layers"])
        same("config's media type", made[0]["config"]["mediaType"], made[1]["config"]["mediaType"])


def access(bench: Bench) -> None:
    """Without a login, with a wrong one and without the CA both refuse, and nobody's message has the password."""
    source = pushed(bench, "busybox")
    bench.skopeo_fails("inspect", source, login=False)
    said = [
        bench.ocid_fails("manifest", "inspect", "--authfile", "/dev/null", source),
        bench.ocid_fails("manifest", "inspect", "--creds", f"conformance:{PASSWORD}-wrong", source),
    ]
    for text in said:
        holds(f"no reason is given: {text}", "401" in text)
        holds("the password is in the message", PASSWORD not in text)
    hosts = bench.directory / "certs.d" / bench.address / "hosts.toml"
    kept = hosts.read_text()
    try:
        hosts.write_text(f'server = "https://{bench.address}"\n')
        holds("an unknown certificate", "not trusted" in bench.ocid_fails("manifest", "inspect", source))
    finally:
        hosts.write_text(kept)
    bench.ocid("manifest", "inspect", "--authfile", "/dev/null", "--creds", f"conformance:{PASSWORD}", source)


def inspection(bench: Bench) -> None:
    """`inspect` without pulling says the same."""
    for name in ("busybox", "nginx"):
        source = pushed(bench, name)
        ours, theirs = json.loads(bench.ocid("inspect", source)), json.loads(bench.skopeo("inspect", source))
        tags = json.loads(bench.skopeo("list-tags", source.rpartition(":")[0]))["Tags"]
        same(f"{name}: RepoTags", ours["RepoTags"], tags)
        for key in ("Name", "Digest", "Labels", "Architecture", "Os", "Layers", "LayersData", "Env"):
            mine, other = ours.get(key), theirs.get(key)
            if key == "LayersData":  # which skopeo has since 1.10, with annotations
                mine, other = (mine, _plain(other)) if other else (None, None)
            same(f"{name}: {key}", mine or None, other or None)


def config_and_tags(bench: Bench) -> None:
    """A config byte by byte, and a repository's tags."""
    source = pushed(bench, "nginx")
    for tag in ("2", "10", "a"):
        bench.ocid("copy", source, bench.docker(f"tagged/nginx:{tag}"))
    same("digest", bench.ocid("manifest", "digest", source).strip(), bench.digest(source))
    same("config", bench.ocid("manifest", "config", source), bench.skopeo("inspect", "--config", "--raw", source))
    name = bench.docker("tagged/nginx")
    same("tags", json.loads(bench.ocid("manifest", "tags", name)), json.loads(bench.skopeo("list-tags", name)))


def deletion(bench: Bench) -> None:
    """What ocid deletes skopeo does not find, and the other way round; what else is there stays."""
    for number, (name, recipe) in enumerate((("one", "busybox"), ("two", "layers"), ("three", "nginx"))):
        bench.ocid("copy", pushed(bench, recipe), bench.docker(f"deleted/app:{name}"))
        if number == 0:
            bench.ocid("manifest", "delete", bench.docker("deleted/app:one"))
        elif number == 1:
            bench.skopeo("delete", bench.docker("deleted/app:two"))
    bench.skopeo_fails("inspect", bench.docker("deleted/app:one"))
    holds("the reason is not told", "404" in bench.ocid_fails("manifest", "inspect", bench.docker("deleted/app:two")))
    bench.raw(bench.docker("deleted/app:three"))


def unverified(bench: Bench) -> None:
    """A registry whose certificate nobody knows: refused, and taken where the command says so."""
    source, directory = pushed(bench, "busybox"), bench.fresh("unverified")
    hosts = bench.directory / "certs.d" / bench.address / "hosts.toml"
    kept = hosts.read_text()
    try:
        hosts.unlink()
        bench.ocid_fails("copy", source, f"dir:{directory}/refused")
        bench.ocid("copy", "--src-tls-verify=false", source, f"dir:{directory}/ours")
        bench.ocid("copy", "--dest-tls-verify=false", f"dir:{directory}/ours", bench.docker("unverified/busybox:1"))
        json.loads(bench.ocid("inspect", "--tls-verify=false", source))
    finally:
        hosts.write_text(kept)
    same("pushed", bench.raw(bench.docker("unverified/busybox:1")), bench.raw(source))


def pull_and_save(bench: Bench) -> None:
    """What was pulled leaves the store as it came: by digest, into an archive that skopeo reads."""
    source, directory = pushed(bench, "nginx"), bench.fresh("pull_and_save")
    name = source.removeprefix("docker://")
    identifier = bench.ocid("pull", name).strip()
    same("id", identifier, json.loads(bench.raw(source))["config"]["digest"])
    same(
        "pushed from the store",
        bench.ocid("copy", f"ocid:{name}", bench.docker("saved/nginx:1")).strip(),
        bench.digest(source),
    )
    target = bench.docker("pushed/nginx:1").removeprefix("docker://")
    same("ocid push", bench.ocid("push", name, target).strip(), bench.digest(f"docker://{target}"))
    bench.ocid("save", "--format", "oci-archive", "-o", f"{directory}/saved.tar", name)
    entry = json.loads(bench.raw(f"oci-archive:{directory}/saved.tar"))
    same("saved", entry, json.loads(bench.raw(source)))
    holds("doctor", "everything is as it is recorded" in bench.ocid("doctor"))


def umoci_unpacks_ours(bench: Bench) -> None:
    """A layout that ocid wrote, unpacked by umoci, is the tree that ocid unpacked."""
    directory = bench.fresh("umoci_unpacks_ours")
    for name in ("layers", "nginx"):
        source = pushed(bench, name)
        reference = source.removeprefix("docker://")
        bench.ocid("pull", reference)
        bench.ocid("copy", source, f"oci:{directory}/layout:{name}")
        theirs = _umoci_unpack(directory / "layout", name, directory / f"bundle-{name}")
        _compare(bench, name, _unpacked(bench, reference), theirs)


def we_unpack_umocis(bench: Bench) -> None:
    """What umoci repacked, unpacked by ocid, is the tree that umoci unpacks."""
    directory = bench.fresh("we_unpack_umocis")
    layout, bundle = directory / "layout", directory / "bundle"
    bench.skopeo("copy", _layout(bench, "busybox"), f"oci:{layout}:base")
    _umoci_unpack(layout, "base", bundle)
    _change(bundle / "rootfs")
    _umoci("repack", "--image", f"{layout}:changed", str(bundle))
    theirs = _umoci_unpack(layout, "changed", directory / "again")
    bench.ocid("copy", f"oci:{layout}:changed", "ocid:localhost/umoci:changed")
    _compare(bench, "changed", _unpacked(bench, "localhost/umoci:changed"), theirs)


CASES: tuple[Case, ...] = (
    push,
    mount,
    all_platforms,
    one_platform,
    to_layout,
    to_directory,
    archives,
    conversion,
    access,
    inspection,
    config_and_tags,
    deletion,
    unverified,
    pull_and_save,
    umoci_unpacks_ours,
    we_unpack_umocis,
)

# ------------------------------------------------------------------------------------------------------------- helpers


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _essence(manifest: dict[str, object]) -> object:
    """What two manifests for the same image must share, in whatever words."""
    layers, config = manifest["layers"], manifest["config"]
    assert isinstance(layers, list) and isinstance(config, dict)
    return config["digest"], [layer["digest"] for layer in layers]


def _plain(layers: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{field: layer[field] for field in ("MIMEType", "Digest", "Size")} for layer in layers]


def _umoci(*words: str) -> None:
    done = subprocess.run(["umoci", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CaseFailed(f"umoci {' '.join(words)}: {done.stderr[-1000:]}")


def _umoci_unpack(layout: Path, tag: str, bundle: Path) -> Listing:
    _umoci("unpack", "--image", f"{layout}:{tag}", str(bundle))
    return listing(bundle / "rootfs")


def _change(rootfs: Path) -> None:
    """Something of every kind that a layer can say."""
    (rootfs / "new/deep").mkdir(parents=True)
    file = rootfs / "new/deep/file"
    file.write_bytes(os.urandom(100_000))
    os.link(file, rootfs / "new/link")
    os.symlink("deep/file", rootfs / "new/symlink")
    os.mkfifo(rootfs / "new/fifo")
    os.mknod(rootfs / "new/device", 0o020640, os.makedev(1, 3))
    file.chmod(0o4751)
    os.chown(rootfs / "new/link", 1000, 50)
    os.setxattr(file, "user.conformance", b"value\0with a nul")
    (rootfs / "new" / ("long" * 60)).write_text("a name of 240 characters")
    (rootfs / "new/ünïcödé").write_text("a name beyond ASCII")
    for path in (file, rootfs / "new/deep", rootfs / "new"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    (rootfs / "etc/passwd").unlink()


def _unpacked(bench: Bench, name: str) -> Listing:
    """The tree of an image of the store, through an overlay of its layers as a container has it."""
    status = json.loads(bench.ocid("inspect", name))[0]
    chain, layers = status["info"]["chainID"], []
    with closing(sqlite3.connect(f"file:{bench.directory}/root/ocid.db?mode=ro", uri=True)) as db:
        known = {row[0]: row[1:] for row in db.execute("SELECT chain_id, parent, number FROM snapshotter_layers")}
    while chain is not None:
        chain, number = known[chain]
        layers.append(bench.directory / f"root/snapshots/layers/{number}/fs")
    return merged(layers)


def _compare(bench: Bench, what: str, ours: Listing, theirs: Listing) -> None:
    for tree in (ours, theirs):
        for looks in tree.values():
            # A directory that no layer has an entry for, only for what is in it, is as old as its unpacking.
            looks[MTIME] = 0 if looks[MTIME] >= bench.began else looks[MTIME]
    same(f"{what}: names", sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours)))
    wrong = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    if wrong:
        raise CaseFailed(f"{what}: {len(wrong)} entries differ (ours, theirs): {dict(list(wrong.items())[:5])}")
