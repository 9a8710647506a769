"""Manifests, indexes and configs from a hostile hand: refused with one sentence, never a crash."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagestore.config import StoreConfig
from imagestore.manifest import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Index,
    Manifest,
    chain_ids,
    check_platform,
    choose,
    parse_config,
    parse_document,
)
from imagestore.model import ContentInvalid, ImageConfig, ImageNotFound, ReferenceInvalid
from imagestore.platforms import Platform, host_platform, parse_platform
from tests.costs import within
from tests.fakes.registry import BuiltImage, as_json, build_image, build_index

CONFIG = StoreConfig(hosts_directories=())
AMD64 = Platform("linux", "amd64")
D = "sha256:" + "b" * 64


def document(data: bytes, announced: str = "", expected: str = "") -> Manifest | Index:
    return parse_document(data, announced, expected, "manifest x", CONFIG)


def manifest(data: bytes) -> Manifest:
    parsed = document(data)
    assert isinstance(parsed, Manifest)
    return parsed


def config_of(image: BuiltImage) -> tuple[Any, Any]:
    return parse_config(image.blobs[image.config_digest], manifest(image.manifest), "config x", CONFIG)


# ------------------------------------------------------------------------------------------------------------ accepted


@pytest.mark.parametrize("docker", [False, True])
def test_manifest(docker: bool) -> None:
    image = build_image([{"a": b"1"}, {"b": b"2"}], docker=docker)
    parsed = document(image.manifest, f"{image.media_type}; charset=utf-8", image.media_type)
    assert isinstance(parsed, Manifest) and parsed.media_type == image.media_type
    assert tuple(layer.digest for layer in parsed.layers) == image.layer_digests
    config, layers = config_of(image)
    assert config.cmd == ("/bin/hello",) and config.env == ("PATH=/bin",)
    assert tuple(layer.diff_id for layer in layers) == image.diff_ids


def test_media_type_may_be_missing_or_generic() -> None:
    image = build_image(edit_manifest=lambda doc: doc.pop("mediaType"))
    for announced in ("", "application/json", "text/plain", "application/octet-stream", OCI_MANIFEST):
        assert isinstance(document(image.manifest, announced), Manifest)
    index = as_json({"schemaVersion": 2, "manifests": []})
    assert isinstance(document(index), Index)


def test_chain_ids_are_those_of_the_image_spec() -> None:
    one, two, three = "sha256:" + "1" * 64, "sha256:" + "2" * 64, "sha256:" + "3" * 64
    import hashlib

    second = "sha256:" + hashlib.sha256(f"{one} {two}".encode()).hexdigest()
    third = "sha256:" + hashlib.sha256(f"{second} {three}".encode()).hexdigest()
    assert chain_ids((one, two, three)) == (one, second, third)


def test_config_fields_of_every_kind() -> None:
    image = build_image(
        config={
            "User": "1000:1000",
            "Env": ["A=1"],
            "Entrypoint": ["/e"],
            "Cmd": None,
            "WorkingDir": "/w",
            "StopSignal": "SIGINT",
            "Volumes": {"/v": {}},
            "ExposedPorts": {"80/tcp": {}},
            "Labels": {"k": "v"},
        }
    )
    config, _ = config_of(image)
    assert config == ImageConfig(
        user="1000:1000",
        env=("A=1",),
        entrypoint=("/e",),
        working_dir="/w",
        stop_signal="SIGINT",
        volumes=("/v",),
        exposed_ports=("80/tcp",),
        labels={"k": "v"},
        architecture="amd64",
    )


def test_config_without_config() -> None:
    config, _ = config_of(build_image(edit_config=lambda doc: doc.update(config=None)))
    assert config.cmd == () and config.labels == {}


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("data", "announced", "expected", "says"),
    [
        (as_json({"schemaVersion": 2, "manifests": [], "layers": []}), "", "", "both an index and a manifest"),
        (as_json({"schemaVersion": 2, "manifests": [], "config": {}}), "", "", "both an index and a manifest"),
        (build_image().manifest, OCI_INDEX, "", "contradict"),
        (build_image().manifest, DOCKER_MANIFEST, "", "contradict"),
        (build_image().manifest, "", DOCKER_MANIFEST, "contradict"),
        (build_index([build_image()]), OCI_MANIFEST, "", "contradict"),
        (build_index([build_image()]), DOCKER_LIST, "", "contradict"),
        (as_json({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "manifests": []}), "", "", "does not fit"),
        (as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "layers": []}), "", "", "does not fit"),
        (as_json({"schemaVersion": 2, "layers": []}), OCI_INDEX, "", "does not fit"),
        (as_json({"schemaVersion": 2, "fsLayers": []}), "", "", "no image manifest"),
        (as_json({"schemaVersion": 2, "mediaType": "application/x", "layers": []}), "", "", "no image manifest"),
    ],
)
def test_s25_media_type_confusion(data: bytes, announced: str, expected: str, says: str) -> None:
    with pytest.raises(ContentInvalid, match=says):
        document(data, announced, expected)


def test_schema_1_is_refused_by_name() -> None:
    for data, announced in (
        (as_json({"schemaVersion": 1, "fsLayers": []}), ""),
        (build_image().manifest, "application/vnd.docker.distribution.manifest.v1+prettyjws"),
    ):
        with pytest.raises(ContentInvalid, match="schema 1"):
            document(data, announced)


@pytest.mark.parametrize(
    ("media_type", "says"),
    [
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign layer"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign layer"),
        ("application/vnd.oci.image.layer.v1.tar+xz", "no layer type"),
        ("", "no layer type"),
    ],
)
def test_s26_layer_types(media_type: str, says: str) -> None:
    def edit(doc: dict[str, Any]) -> None:
        doc["layers"][0].update(mediaType=media_type, urls=["http://evil.example/layer"])

    with pytest.raises(ContentInvalid, match=says):
        document(build_image(edit_manifest=edit).manifest)


def test_artifacts_are_told_by_their_config() -> None:
    helm = "application/vnd.cncf.helm.config.v1+json"

    def edit(doc: dict[str, Any]) -> None:
        doc["config"]["mediaType"] = helm

    made = document(build_image(edit_manifest=edit).manifest)
    assert isinstance(made, Manifest) and made.artifact == helm and made.image_id("the manifest's") == "the manifest's"
    image = document(build_image().manifest)
    assert isinstance(image, Manifest) and image.artifact == ""
    assert image.image_id("the manifest's") == image.config.digest
    with pytest.raises(ContentInvalid, match="which no image has"):
        document(build_image(edit_manifest=edit, docker=True).manifest, DOCKER_MANIFEST)


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../../../etc/passwd",
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "A" * 64,
        "sha256:" + "a" * 64 + "\n",
        "md5:" + "a" * 32,
        "sha512:" + "a" * 128,
        "",
        None,
        7,
        ["x"],
        "sha256:" + "a" * 63 + "\0",
    ],
)
@pytest.mark.parametrize("where", ["config", "layer", "index", "diff_id"])
def test_s43_digests(digest: object, where: str) -> None:
    def edit(doc: dict[str, Any]) -> None:
        if where == "diff_id":
            doc["rootfs"]["diff_ids"][0] = digest
        else:
            (doc["config"] if where == "config" else doc["layers"][0])["digest"] = digest

    if where == "index":
        data = as_json({"schemaVersion": 2, "manifests": [{"mediaType": OCI_MANIFEST, "digest": digest, "size": 1}]})
        with pytest.raises(ContentInvalid):
            document(data)
    elif where == "diff_id":
        with pytest.raises(ContentInvalid):
            config_of(build_image(edit_config=edit))
    else:
        with pytest.raises(ContentInvalid):
            document(build_image(edit_manifest=edit).manifest)


@pytest.mark.parametrize("size", [-1, 1 << 63, 10**18, 1.5, "7", True, None, [], {}])
def test_s45_sizes(size: object) -> None:
    def edit(doc: dict[str, Any]) -> None:
        doc["layers"][0]["size"] = size

    with pytest.raises(ContentInvalid):
        document(build_image(edit_manifest=edit).manifest)


def test_s45_counts() -> None:
    def more(doc: dict[str, Any]) -> None:
        doc["rootfs"]["diff_ids"].append(D)

    with pytest.raises(ContentInvalid, match="2 diff ids for the 1 layers"):
        config_of(build_image(edit_config=more))
    with pytest.raises(ContentInvalid, match="1 diff ids for the 0 layers"):
        config_of(build_image([], edit_config=more))
    with pytest.raises(ContentInvalid, match="the limit is 500"):
        document(build_image([{"a": b""}] * 501).manifest)


def _null_layers(doc: dict[str, Any]) -> None:
    doc["layers"] = None


def _no_rootfs(doc: dict[str, Any]) -> None:
    del doc["rootfs"]


def _null_diff_ids(doc: dict[str, Any]) -> None:
    doc["rootfs"]["diff_ids"] = None


@pytest.mark.parametrize("edit", [None, _no_rootfs, _null_diff_ids])
def test_an_image_without_layers(edit: Callable[[dict[str, Any]], None] | None) -> None:
    """FROM scratch and nothing else, as Go's encoders write it: containerd and skopeo take it."""
    image = build_image([], edit_config=edit, edit_manifest=_null_layers)
    config, layers = config_of(image)
    assert layers == () and config.cmd == ("/bin/hello",)
    with pytest.raises(ContentInvalid, match='expected "layers"'):
        config_of(build_image(edit_config=_no_rootfs))


def test_s35_wide_index() -> None:
    entries = [{"mediaType": OCI_MANIFEST, "digest": D, "size": 1}] * 10_000
    with pytest.raises(ContentInvalid, match="10000 entries, the limit is 2048"):
        document(as_json({"schemaVersion": 2, "manifests": entries}))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"schemaVersion":2,"layers":[],"layers":[]}', "duplicate key 'layers'"),
        (b'{"schemaVersion":2,"config":{"a":1,"a":2}}', "duplicate key 'a'"),
        (b'{"schemaVersion":NaN}', "NaN"),
        (b'{"schemaVersion":Infinity}', "Infinity"),
        (b'{"schemaVersion":' + b"9" * 5000 + b"}", "number of 5000 digits"),
        (b'{"schemaVersion":1e400}', "expected an integer"),
        (b'{"schemaVersion":true}', "expected an integer"),
        (b'{"SchemaVersion":2,"layers":[]}', "must be spelled 'schemaVersion'"),
        (b'{"schemaVersion":2,"Layers":[],"config":{}}', "must be spelled 'layers'"),
        (b'{"schemaVersion":2,"mediaType":"\\ud800","layers":[]}', "surrogate"),
        (b'{"schemaVersion":2,"mediaType":"a\\u0000b","layers":[]}', "NUL"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"{" + b'"a":[[],[]],' * 100_000 + b'"b":1}', "more than 200000 JSON values"),
    ],
)
def test_p7_json(data: bytes, says: str) -> None:
    with within(8000), pytest.raises(ContentInvalid, match=says):
        document(data)


def test_size_1e400_is_no_integer() -> None:
    data = build_image().manifest.replace(b'"size":', b'"size":1e400,"was":', 1)
    with pytest.raises(ContentInvalid):
        document(data)


# ------------------------------------------------------------------------------------------------------------ mutation

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths(inner, (*at, key))
    if isinstance(value, list):
        for number, inner in enumerate(value):
            found += _paths(inner, (*at, number))
    return found


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy


@functools.cache
def _documents() -> dict[str, bytes]:
    image = build_image(
        [{"a": b"1"}, {"b": b"2"}], config={"Env": ["A=1"], "Labels": {"a": "b"}, "Volumes": {"/v": {}}}
    )
    index = build_index([image, build_image(architecture="arm64")])
    return {"manifest": image.manifest, "config": image.blobs[image.config_digest], "index": index}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_s45_mutated_documents_are_refused_or_sound(data: st.DataObject) -> None:
    documents = _documents()
    kind = data.draw(st.sampled_from(sorted(documents)))
    value = json.loads(documents[kind])
    path = data.draw(st.sampled_from(_paths(value)))
    spoiled = json.dumps(_replaced(value, path, data.draw(_json))).encode()
    try:
        if kind == "config":
            parse_config(spoiled, manifest(documents["manifest"]), "config x", CONFIG)
        else:
            parsed = document(spoiled)
            if isinstance(parsed, Index):
                choose(parsed, AMD64, "x")
    except (ContentInvalid, ImageNotFound) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_cleanly(data: bytes) -> None:
    with pytest.raises(ContentInvalid):
        document(data)


# ----------------------------------------------------------------------------------------------------------- platforms


@pytest.mark.parametrize(
    ("mine", "offered", "best"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/amd64", ["windows/amd64", "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64/v1"], 1),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], 1),
        ("linux/arm64/v8", ["linux/arm/v7", "linux/arm64"], 1),
        ("linux/arm64/v8", ["linux/arm64/v8"], 0),
        ("linux/arm64", ["linux/arm64/v8"], 0),
        ("linux/aarch64", ["linux/arm64/v8"], 0),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], 2),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], 1),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], 1),
        ("linux/s390x", ["linux/s390x"], 0),
    ],
)
def test_platform_choice(mine: str, offered: list[str], best: int) -> None:
    entries = []
    for number, name in enumerate(offered):
        os, architecture, *variant = name.split("/")
        platform = {"os": os, "architecture": architecture, **({"variant": variant[0]} if variant else {})}
        digest = f"sha256:{number:064x}"
        entries.append({"mediaType": OCI_MANIFEST, "digest": digest, "size": 1, "platform": platform})
    index = document(as_json({"schemaVersion": 2, "manifests": entries}))
    assert isinstance(index, Index)
    assert choose(index, parse_platform(mine), "x").descriptor.digest == f"sha256:{best:064x}"


def test_no_platform_fits_and_says_what_there_is() -> None:
    index = document(build_index([build_image(architecture="arm64", variant="v8"), build_image(architecture="s390x")]))
    assert isinstance(index, Index)
    with pytest.raises(ImageNotFound, match="no image for linux/amd64; there is linux/arm64/v8, linux/s390x"):
        choose(index, AMD64, "x")


def test_attestations_are_never_chosen() -> None:
    image = build_image()
    attestation = {
        "mediaType": OCI_MANIFEST,
        "digest": D,
        "size": 1,
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
        "platform": {"os": "linux", "architecture": "amd64"},
    }
    index = document(as_json({"schemaVersion": 2, "manifests": [attestation, image.descriptor()]}))
    assert isinstance(index, Index)
    assert choose(index, AMD64, "x").descriptor.digest == image.digest


def test_image_for_another_machine() -> None:
    with pytest.raises(ImageNotFound, match="for linux/arm64, wanted is one for linux/amd64"):
        check_platform(ImageConfig(architecture="arm64"), AMD64, "config x")
    check_platform(ImageConfig(architecture=""), AMD64, "config x")
    check_platform(ImageConfig(architecture="amd64"), host_platform() if host_platform() == AMD64 else AMD64, "x")


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/am d64", "linux/amd64\n"])
def test_bad_platforms(text: str) -> None:
    with pytest.raises(ReferenceInvalid):
        parse_platform(text)
