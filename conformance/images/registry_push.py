"""Puts an OCI layout into a registry through the distribution API (distribution-spec, push): blobs that are missing,
then manifests, those an index points at first. Plain HTTP and no credentials: for registries of tests on loopback."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conformance.images.layout import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, REF_NAME

MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)


def push(layout: Path, address: str) -> list[str]:
    """Pushes every named image of `layout` to the registry at `address` ("host:port"); returns their references."""
    index = json.loads((layout / "index.json").read_bytes())
    connection = http.client.HTTPConnection(address, timeout=120)
    pushed = []
    try:
        for descriptor in index["manifests"]:
            repository, _, tag = descriptor["annotations"][REF_NAME].partition(":")
            _push_manifest(connection, layout, repository, descriptor, tag)
            pushed.append(f"{address}/{repository}:{tag}")
    finally:
        connection.close()
    return pushed


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def _push_manifest(
    connection: http.client.HTTPConnection, layout: Path, repository: str, descriptor: dict[str, Any], name: str
) -> None:
    data = _blob(layout, descriptor["digest"]).read_bytes()
    document = json.loads(data)
    if descriptor["mediaType"] == OCI_INDEX:
        for child in document["manifests"]:
            _push_manifest(connection, layout, repository, child, child["digest"])
    else:
        for blob in [document["config"], *document["layers"]]:
            _push_blob(connection, layout, repository, blob)
    path = f"/v2/{repository}/manifests/{name}"
    _call(connection, "PUT", path, data, {"Content-Type": descriptor["mediaType"]}, 201)


def _push_blob(
    connection: http.client.HTTPConnection, layout: Path, repository: str, descriptor: dict[str, Any]
) -> None:
    digest = descriptor["digest"]
    connection.request("HEAD", f"/v2/{repository}/blobs/{digest}")
    response = connection.getresponse()
    response.read()
    if response.status == 200:
        return
    location = _call(connection, "POST", f"/v2/{repository}/blobs/uploads/", b"", {}, 202)
    parts = urlsplit(location)
    path = f"{parts.path}?{parts.query}&digest={digest}" if parts.query else f"{parts.path}?digest={digest}"
    with open(_blob(layout, digest), "rb") as body:
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor["size"])}
        _call(connection, "PUT", path, body, headers, 201)


def _call(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any, headers: dict[str, str], expected: int
) -> str:
    """One request; returns the Location header. Raises with the registry's own words."""
    connection.request(method, path, body=body, headers=headers)
    response = connection.getresponse()
    text = response.read()
    if response.status != expected:
        raise RuntimeError(f"{method} {path}: {response.status} {response.reason}: {text[:300]!r}")
    return response.getheader("Location") or ""
