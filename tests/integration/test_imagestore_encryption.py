"""Encrypted layers: what Debian's skopeo encrypts is pulled by us, what we encrypt is read by skopeo, and nothing of it
by anybody who has no key."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from imagestore.encryption.keys import key_files, keys_below, recipients
from imagestore.encryption.layers import PUBLIC, Opener, private_options, public_options
from imagestore.encryption.sealing import encrypt
from imagestore.errands import Errand
from imagestore.model import ContentInvalid, DecryptionRefused, Descriptor, Image, ImageError
from tests.fakes.imagestore import Bench, run
from tests.fakes.registry import OCI_MANIFEST, BuiltImage, FakeRegistry, as_json, build_image, sha256, write_layout
from tests.fakes.unpacker import MemoryUnpacker
from tests.integration.test_imagestore_copy import copy, skopeo

SECRET = b"the secret of the house" * 400
IMAGE = build_image([{"etc/one": SECRET, "bin/app": b"app"}, {"etc/two": SECRET}])
ZSTD = build_image([{"etc/one": SECRET}], compression="zstd")


class Keys:
    """Key pairs of openssl's making."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def _openssl(self, *words: str) -> bytes:
        return subprocess.run(["openssl", *words], cwd=self.directory, capture_output=True, check=True).stdout

    def private(self, name: str) -> Path:
        """RSA unless its name says a curve."""
        path = self.directory / f"{name}.key"
        if not path.exists():
            curve = name.partition("-")[2]
            kind = ["EC", "-pkeyopt", f"ec_paramgen_curve:{curve}"] if curve else ["RSA"]
            self._openssl("genpkey", "-algorithm", *kind, "-out", str(path))
        return path

    def public(self, name: str) -> Path:
        path = self.directory / f"{name}.pub"
        self._openssl("pkey", "-in", str(self.private(name)), "-pubout", "-out", str(path))
        return path

    def certificate(self, name: str) -> Path:
        path = self.directory / f"{name}.pem"
        if not path.exists():
            self._openssl("req", "-x509", "-key", str(self.private(name)), "-subj", f"/CN={name}", "-out", str(path))
        return path

    def locked(self, name: str, password: str, *, traditional: bool = False) -> Path:
        path = self.directory / f"{name}.locked"
        how = ["rsa", "-aes256", "-traditional"] if traditional else ["pkey", "-aes256"]
        self._openssl(*how, "-in", str(self.private(name)), "-passout", f"pass:{password}", "-out", str(path))
        return path


@dataclass
class World:
    """A registry, a store whose node has keys in a directory, and key pairs."""

    directory: Path
    registry: FakeRegistry
    keys: Keys
    bench: Bench = field(init=False)

    def __post_init__(self) -> None:
        self.node_keys = self.directory / "node-keys"
        (self.directory / "store").mkdir()
        self.bench = Bench(self.directory / "store", decryption_keys=self.node_keys)

    @property
    def unpacker(self) -> MemoryUnpacker:
        assert isinstance(self.bench.unpacker, MemoryUnpacker)
        return self.bench.unpacker

    def layout(self, image: BuiltImage = IMAGE) -> Path:
        path = self.directory / f"layout-{image.digest[7:15]}"
        if not path.exists():
            write_layout(path, {"1": image})
        return path

    def by_skopeo(self, *to: str, image: BuiltImage = IMAGE) -> Path:
        """A layout that skopeo has encrypted."""
        target = self.directory / f"skopeo-{len(list(self.directory.iterdir()))}"
        options = [word for one in to for word in ("--encryption-key", one)]
        skopeo("copy", "-q", *options, f"oci:{self.layout(image)}:1", f"oci:{target}:1")
        return target

    def by_us(self, *to: str, image: BuiltImage = IMAGE) -> Path:
        target = self.directory / f"ours-{len(list(self.directory.iterdir()))}"
        copy(f"oci:{self.layout(image)}:1", f"oci:{target}:1", recipients=recipients(to))
        return target

    def serve(self, layout: Path, name: str = "team/app", edit: Callable[[dict[str, Any]], None] | None = None) -> str:
        """A layout's image in the registry."""
        for path in (layout / "blobs/sha256").iterdir():
            self.registry.blobs[f"sha256:{path.name}"] = path.read_bytes()
        manifest = manifest_of(layout)
        if edit is not None:
            edit(manifest)
        self.registry.put(name, "1", as_json(manifest), OCI_MANIFEST)
        return f"{self.registry.name}/{name}:1"

    def pull(self, name: str, *keys: str | Path) -> Image:
        return run(self.bench.store.pull(name, keys=key_files(map(str, keys))))

    def gives(self, *keys: str) -> None:
        """The node has these keys from now on."""
        shutil.rmtree(self.node_keys, ignore_errors=True)  # noqa: TID251 -- the test's own files
        self.node_keys.mkdir()
        for key in keys:
            (self.node_keys / key).write_bytes(self.keys.private(key).read_bytes())

    def holds(self, image: Image, built: BuiltImage = IMAGE) -> None:
        """All layers are there, plain in the unpacker and nowhere else."""
        tars = [self.unpacker.layers[layer.chain_id] for layer in image.layers]
        assert [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars] == list(built.diff_ids)
        assert not set(built.layer_digests) & self.bench.blobs()
        for path in self.bench.root.rglob("*"):
            assert not path.is_file() or SECRET[:60] not in path.read_bytes()

    def holds_nothing(self) -> None:
        assert self.unpacker.layers == {}
        assert self.bench.store.list() == []


def manifest_of(layout: Path) -> dict[str, Any]:
    index = json.loads((layout / "index.json").read_bytes())
    digest = index["manifests"][0]["digest"]
    found: dict[str, Any] = json.loads((layout / "blobs/sha256" / digest[7:]).read_bytes())
    return found


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "all")


@pytest.fixture
def world(tmp_path: Path, keys: Keys) -> Iterator[World]:
    with FakeRegistry() as registry:
        made = World(tmp_path, registry, keys)
        yield made
        made.bench.close()


# ------------------------------------------------------------------------------------------------------ both directions

SCHEMES = ["jwe rsa", "jwe p-P-256", "jwe p-P-384", "jwe p-P-521", "pkcs7 rsa"]


def recipient(keys: Keys, scheme: str) -> tuple[str, Path]:
    kind, _, name = scheme.partition(" ")
    public = keys.public(name) if kind == "jwe" else keys.certificate(name)
    return f"{kind}:{public}", keys.private(name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_skopeo_encrypts_we_pull(world: World, scheme: str) -> None:
    to, key = recipient(world.keys, scheme)
    image = world.pull(world.serve(world.by_skopeo(to)), key)
    world.holds(image)
    assert all(layer.blob.media_type.endswith("+gzip+encrypted") for layer in image.layers)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_we_encrypt_skopeo_reads(world: World, scheme: str) -> None:
    to, key = recipient(world.keys, scheme)
    encrypted, plain = world.by_us(to), world.directory / "plain"
    layers = manifest_of(encrypted)["layers"]
    assert not {layer["digest"] for layer in layers} & set(IMAGE.layer_digests)
    given = [str(key), *([str(world.keys.certificate("rsa"))] if scheme.startswith("pkcs7") else [])]
    options = [word for one in given for word in ("--decryption-key", one)]
    skopeo("copy", "-q", *options, f"oci:{encrypted}:1", f"oci:{plain}:1")
    assert [layer["digest"] for layer in manifest_of(plain)["layers"]] == list(IMAGE.layer_digests)


def test_several_recipients_each_of_whom_can_read(world: World) -> None:
    to = [recipient(world.keys, scheme)[0] for scheme in SCHEMES]
    name = world.serve(world.by_us(*to))
    for scheme in SCHEMES:
        opened = Opener(None).open_blob(layer_of(world, name), key_files([str(recipient(world.keys, scheme)[1])]))
        assert opened.digest == IMAGE.layer_digests[0]
    theirs = world.serve(world.by_skopeo(*to[:3]), "their/app")
    for scheme in SCHEMES[:3]:
        Opener(None).open_blob(layer_of(world, theirs), key_files([str(recipient(world.keys, scheme)[1])]))
    world.holds(world.pull(name, recipient(world.keys, "jwe p-P-384")[1]))


def layer_of(world: World, name: str) -> Descriptor:
    repository = name.partition("/")[2].partition(":")[0]
    layer = json.loads(world.registry.manifests[(repository, "1")][0])["layers"][0]
    return Descriptor(layer["mediaType"], layer["digest"], layer["size"], layer["annotations"])


def test_zstd_and_plain_layers(world: World) -> None:
    to, key = recipient(world.keys, "jwe rsa")
    world.holds(world.pull(world.serve(world.by_us(to, image=ZSTD)), key), ZSTD)
    plain = build_image([{"etc/one": SECRET}], compression="")
    world.holds(world.pull(world.serve(world.by_us(to, image=plain), "plain/app"), key), plain)


def test_pkcs7_as_openssl_writes_it(world: World) -> None:
    """AES-CBC, which ocicrypt does not make."""
    layout = world.by_us(f"jwe:{world.keys.public('other')}")
    layer = manifest_of(layout)["layers"][0]
    key, nonce, mac = (
        Opener(None)
        .open_blob(
            Descriptor(layer["mediaType"], layer["digest"], layer["size"], layer["annotations"]),
            key_files([str(world.keys.private("other"))]),
        )
        .key
    )
    options = private_options(key, nonce, IMAGE.layer_digests[0])
    made = subprocess.run(
        ["openssl", "cms", "-encrypt", "-binary", "-outform", "DER", "-aes-256-cbc", world.keys.certificate("rsa")],
        input=options,
        capture_output=True,
        check=True,
    ).stdout
    annotations = {
        "org.opencontainers.image.enc.keys.pkcs7": base64.b64encode(made).decode(),
        PUBLIC: public_options(mac),
    }
    blob = Descriptor(layer["mediaType"], layer["digest"], layer["size"], annotations)
    assert Opener(None).open_blob(blob, key_files([str(world.keys.private("rsa"))])).key == (key, nonce, mac)


# ---------------------------------------------------------------------------------------------------------- who may not


def test_without_a_key_nothing_is_fetched(world: World) -> None:
    name = world.serve(world.by_skopeo(f"jwe:{world.keys.public('rsa')}"))
    with pytest.raises(DecryptionRefused, match=r"encrypted \(jwe\), and there is no private key to open it; give one"):
        world.pull(name)
    with pytest.raises(DecryptionRefused, match="none of the 2 private keys opens it"):
        world.pull(name, world.keys.private("other"), world.keys.private("p-P-256"))
    world.holds_nothing()
    blobs = {layer["digest"] for layer in json.loads(world.registry.manifests[("team/app", "1")][0])["layers"]}
    assert not blobs & world.bench.blobs()
    assert not any(world.registry.count("GET", f"/v2/team/app/blobs/{digest}") for digest in blobs)


@pytest.mark.parametrize("scheme", ["pgp", "pkcs11"])
def test_a_scheme_that_we_have_not_is_named(world: World, scheme: str) -> None:
    """With the layer, and without talk of keys: none would help."""

    def edit(manifest: dict[str, Any]) -> None:
        for layer in manifest["layers"]:
            wrapped = layer["annotations"].pop("org.opencontainers.image.enc.keys.jwe")
            layer["annotations"][f"org.opencontainers.image.enc.keys.{scheme}"] = wrapped

    name = world.serve(world.by_skopeo(f"jwe:{world.keys.public('rsa')}"), edit=edit)
    says = rf"layer sha256:[0-9a-f]{{64}}: encrypted \({scheme}\), which no key opens here: jwe, pkcs7 and key "
    for keys in ((), (world.keys.private("rsa"),)):
        with pytest.raises(DecryptionRefused, match=says):
            world.pull(name, *keys)


def test_ciphertext_that_was_altered_is_not_committed(world: World) -> None:
    """With digests that fit: only the HMAC, under a key that the attacker lacks, tells."""
    layout = world.by_skopeo(f"jwe:{world.keys.public('rsa')}")

    def edit(manifest: dict[str, Any]) -> None:
        layer = manifest["layers"][1]
        data = bytearray((layout / "blobs/sha256" / layer["digest"][7:]).read_bytes())
        data[4] ^= 1  # a byte of gzip's time stamp: the plain text inflates to the same tar, whose diff id is right
        world.registry.blobs[sha256(bytes(data))] = bytes(data)
        layer["digest"] = sha256(bytes(data))

    name = world.serve(layout, edit=edit)
    with pytest.raises(ContentInvalid, match="HMAC"):
        world.pull(name, world.keys.private("rsa"))
    assert len(world.unpacker.layers) <= 1 and world.bench.store.list() == []


@pytest.mark.parametrize("what", ["hmac", "cipher", "packet", "missing"])
def test_annotations_that_were_altered(world: World, what: str) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        annotations = manifest["layers"][0]["annotations"]
        public = json.loads(base64.b64decode(annotations[PUBLIC]))
        if what == "hmac":
            public["hmac"] = base64.b64encode(bytes(32)).decode()
        elif what == "cipher":
            public["cipher"] = "AES_256_ECB"
        annotations[PUBLIC] = base64.b64encode(as_json(public)).decode()
        if what == "missing":
            del annotations[PUBLIC]
        if what == "packet":
            jwe = json.loads(base64.b64decode(annotations["org.opencontainers.image.enc.keys.jwe"]))
            sealed = bytearray(base64.urlsafe_b64decode(jwe["ciphertext"] + "=="))
            sealed[0] ^= 1
            jwe["ciphertext"] = base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()
            annotations["org.opencontainers.image.enc.keys.jwe"] = base64.b64encode(as_json(jwe)).decode()

    name = world.serve(world.by_skopeo(f"jwe:{world.keys.public('rsa')}"), edit=edit)
    said = {"hmac": "HMAC", "cipher": "AES_256_ECB", "packet": "none of the 1", "missing": "pubopts"}[what]
    with pytest.raises(ImageError, match=said):
        world.pull(name, world.keys.private("rsa"))
    assert world.bench.store.list() == []
    assert IMAGE.diff_ids[0] not in world.unpacker.layers


def test_recipients_without_end_are_not_tried(world: World) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        annotations = manifest["layers"][0]["annotations"]
        one = annotations["org.opencontainers.image.enc.keys.jwe"]
        annotations["org.opencontainers.image.enc.keys.jwe"] = ",".join([one] * 2100)

    name = world.serve(world.by_us(f"jwe:{world.keys.public('p-P-256')}"), edit=edit)
    with pytest.raises(ContentInvalid, match="more than 4096 attempts"):
        world.pull(name, world.keys.private("p-P-384"), world.keys.private("p-P-521"))


# ---------------------------------------------------------------------------------- what was unpacked for somebody else


def test_an_image_is_used_by_who_has_a_key_today(world: World) -> None:
    name = world.serve(world.by_skopeo(f"jwe:{world.keys.public('rsa')}"))
    image = world.pull(name, world.keys.private("rsa"))
    store, given = world.bench.store, key_files([str(world.keys.private("rsa"))])
    with pytest.raises(DecryptionRefused, match=f"use image {name}"):
        store.permit(image, name)
    with pytest.raises(DecryptionRefused, match=f"pull {name}"):
        world.pull(name)
    store.permit(image, name, keys=given)
    world.gives("other", "rsa")
    store.permit(image, name)
    assert world.pull(name) == image
    world.gives("other")
    with pytest.raises(DecryptionRefused):
        store.permit(image, name)


def test_a_diff_id_is_no_key(world: World) -> None:
    """The config is readable for everybody. A manifest of one's own with that config and any blob at all must not be
    given the layer that was unpacked with somebody else's key."""
    layout = world.by_skopeo(f"jwe:{world.keys.public('rsa')}")
    image = world.pull(world.serve(layout), world.keys.private("rsa"))

    def edit(manifest: dict[str, Any]) -> None:
        for layer in manifest["layers"]:
            layer["mediaType"] = layer["mediaType"].removesuffix("+encrypted")
            del layer["annotations"]

    with pytest.raises(ContentInvalid):
        world.pull(world.serve(layout, "evil/app", edit))
    assert {layer.chain_id for layer in image.layers}.isdisjoint(IMAGE.diff_ids)


def test_a_key_of_ones_own_for_somebody_elses_layer(world: World) -> None:
    """The same for one who wraps a key that he has made himself for this node, beside the same blob."""
    layout = world.by_skopeo(f"jwe:{world.keys.public('rsa')}")
    world.gives("rsa")
    world.pull(world.serve(layout))
    other = world.directory / "other"
    other.write_bytes(b"not the layer")
    forged = encrypt(
        other,
        Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", sha256(b"not the layer"), 13),
        recipients([f"jwe:{world.keys.public('rsa')}"]),
        world.directory / "forged",
        None,
        Errand(),
    )

    def edit(manifest: dict[str, Any]) -> None:
        for layer in manifest["layers"]:
            layer["annotations"] = dict(forged.annotations)

    with pytest.raises(ContentInvalid):
        world.pull(world.serve(layout, "evil/app", edit))


def test_a_plain_image_beside_an_encrypted_one(world: World) -> None:
    """Both have one config, so one id; the plain one asks for no key, and the other one still does."""
    encrypted = world.serve(world.by_skopeo(f"jwe:{world.keys.public('rsa')}"))
    plain = world.serve(world.layout(), "plain/app")
    world.bench.store.permit(world.pull(plain), plain)
    with pytest.raises(DecryptionRefused):
        world.pull(encrypted)


# ------------------------------------------------------------------------------------------------------------ key files


def test_keys_with_passwords(world: World, tmp_path: Path) -> None:
    name = world.serve(world.by_skopeo(f"jwe:{world.keys.public('rsa')}"))
    locked, old = world.keys.locked("rsa", "open: sesame"), world.keys.locked("rsa2", "x", traditional=True)
    secret = tmp_path / "password"
    secret.write_text("open: sesame\n")
    with pytest.raises(DecryptionRefused, match="is encrypted, and no password is given"):
        world.pull(name, locked)
    with pytest.raises(DecryptionRefused, match="wrong password"):
        world.pull(name, f"{locked}:pass=shut")
    for said in ("open: sesame", "pass=open: sesame", f"file={secret}"):
        world.holds(world.pull(name, f"{locked}:{said}"))
    assert key_files([f"{old}:x"])[0].password == b"x"
    assert "sesame" not in repr(key_files([f"{locked}:open: sesame"]))


def test_a_directory_of_keys(world: World, tmp_path: Path) -> None:
    name = world.serve(world.by_skopeo(f"pkcs7:{world.keys.certificate('rsa')}"))
    world.gives("other")
    (world.node_keys / "README").write_text("keys of this node")
    (world.node_keys / "node.pem").write_bytes(world.keys.certificate("rsa").read_bytes())
    (world.node_keys / "locked").write_bytes(world.keys.locked("rsa", "x").read_bytes())
    (world.node_keys / "elsewhere").symlink_to(world.keys.private("rsa"))
    with pytest.raises(DecryptionRefused, match="none of the 1 private keys"):
        world.pull(name)
    (world.node_keys / "team").mkdir()
    der = subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-nocrypt", "-outform", "DER", "-in", str(world.keys.private("rsa"))],
        capture_output=True,
        check=True,
    ).stdout
    (world.node_keys / "team/der").write_bytes(der)
    world.holds(world.pull(name))
    assert keys_below(tmp_path / "nowhere") == ()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("/nowhere/key", "no such file"),
        ("provider:", "expected provider:NAME"),
        ("{public}", "no private key"),
        ("{small}", "only RSA of 2048 bits"),
    ],
)
def test_options_that_name_no_key(world: World, option: str, says: str) -> None:
    small = world.keys.directory / "small"
    subprocess.run(["openssl", "genrsa", "-out", str(small), "1024"], check=True, capture_output=True)
    with pytest.raises(DecryptionRefused, match=says):
        key_files([option.format(public=world.keys.public("rsa"), small=small)])


@pytest.mark.parametrize(
    "option", ["pgp:alice@example.com", "rsa.pub", "jwe:/nowhere", "pkcs7:{public}", "jwe:{private}"]
)
def test_options_that_name_no_recipient(world: World, option: str) -> None:
    with pytest.raises(DecryptionRefused, match="encryption key"):
        recipients([option.format(public=world.keys.public("rsa"), private=world.keys.private("rsa"))])


# --------------------------------------------------------------------------------------------------------------- copies


def test_copies_decrypt_and_carry(world: World) -> None:
    to, key = recipient(world.keys, "jwe rsa")
    encrypted = world.by_skopeo(to)
    carried, plain = world.directory / "carried", world.directory / "plain"
    name = world.serve(encrypted)
    assert copy(f"docker://{name}", f"oci:{carried}:1") == sha256(world.registry.manifests[("team/app", "1")][0])
    copy(f"oci:{carried}:1", f"oci:{plain}:1", decryption_keys=key_files([str(key)]))
    assert [layer["digest"] for layer in manifest_of(plain)["layers"]] == list(IMAGE.layer_digests)
    assert "annotations" not in manifest_of(plain)["layers"][0]
    with pytest.raises(DecryptionRefused):
        copy(f"oci:{carried}:1", f"oci:{plain}:2", decryption_keys=key_files([str(world.keys.private("other"))]))
    with pytest.raises(ImageError, match="encrypted already"):
        copy(f"oci:{carried}:1", f"oci:{plain}:2", recipients=recipients([to]))
    with pytest.raises(ImageError, match="would have to change"):
        copy(f"oci:{plain}:1", f"oci:{carried}:2", recipients=recipients([to]), preserve_digests=True)
    with pytest.raises(ImageError, match="docker's format has no encrypted layers"):
        copy(f"oci:{plain}:1", f"docker-archive:{world.directory}/a.tar", recipients=recipients([to]))


def test_from_one_recipient_to_another_with_another_compression(world: World) -> None:
    encrypted, target = world.by_skopeo(f"jwe:{world.keys.public('rsa')}"), world.directory / "again"
    copy(
        f"oci:{encrypted}:1",
        f"oci:{target}:1",
        decryption_keys=key_files([str(world.keys.private("rsa"))]),
        compress="zstd",
        recipients=recipients([f"jwe:{world.keys.public('other')}"]),
    )
    name = world.serve(target)
    with pytest.raises(DecryptionRefused):
        world.pull(name, world.keys.private("rsa"))
    image = world.pull(name, world.keys.private("other"))
    assert [layer.blob.media_type.rpartition("tar")[2] for layer in image.layers] == ["+zstd+encrypted"] * 2
    world.holds(image)


def test_a_copy_does_not_decrypt_what_was_altered(world: World) -> None:
    key = key_files([str(world.keys.private("rsa"))])
    layout = world.by_us(f"jwe:{world.keys.public('rsa')}")
    layer = manifest_of(layout)["layers"][0]
    path = layout / "blobs/sha256" / layer["digest"][7:]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1

    def edit(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["digest"] = sha256(bytes(data))

    world.registry.blobs[sha256(bytes(data))] = bytes(data)
    name = world.serve(layout, edit=edit)
    with pytest.raises(ContentInvalid, match="HMAC"):
        copy(f"docker://{name}", f"oci:{world.directory}/plain:1", decryption_keys=key)
    assert IMAGE.layer_digests[0][7:] not in {path.name for path in (world.directory / "plain").rglob("*")}
