"""The pushing half of the fake registry (distribution-spec, push): uploads, mounts, manifests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs


@dataclass
class Uploads:
    """What is on its way in, by upload id; `has` is which repository has which blob, for mounts."""

    has: set[tuple[str, str]] = field(default_factory=set)
    mounted: list[tuple[str, str]] = field(default_factory=list)
    open: dict[str, bytearray] = field(default_factory=dict)
    begun: int = 0

    def answer(
        self,
        method: str,
        path: str,
        query: str,
        body: bytes,
        blobs: dict[str, bytes],
        manifests: dict[tuple[str, str], tuple[bytes, str]],
        content_type: str,
    ) -> tuple[int, Mapping[str, str]]:
        """Status and headers."""
        asked = parse_qs(query)
        manifest = re.fullmatch(r"/v2/(.+)/manifests/([^/]+)", path)
        if method == "PUT" and manifest:
            digest = _digest(body)
            for target in (manifest[2], digest):
                manifests[(manifest[1], target)] = (body, content_type)
            return 201, {"Docker-Content-Digest": digest, "Location": f"/v2/{manifest[1]}/manifests/{digest}"}
        if method == "DELETE" and manifest:
            gone = [key for key in manifests if key[0] == manifest[1] and _digest(manifests[key][0]) == manifest[2]]
            for key in gone:
                del manifests[key]
            return (202 if gone else 404), {}
        upload = re.fullmatch(r"/v2/(.+)/blobs/uploads/([0-9]*)", path)
        if not upload:
            return 405, {}
        repository, number = upload[1], upload[2]
        if method == "POST":
            digest, origin = asked.get("mount", [""])[0], asked.get("from", [""])[0]
            if digest in blobs and (origin, digest) in self.has:
                self.mounted.append((origin, digest))
                self.has.add((repository, digest))
                return 201, {"Location": f"/v2/{repository}/blobs/{digest}", "Docker-Content-Digest": digest}
            self.begun += 1
            number = str(self.begun)
            self.open[number] = bytearray()
            return 202, {"Location": f"/v2/{repository}/blobs/uploads/{number}?state=x"}
        if number not in self.open:
            return 404, {}
        if method == "DELETE":
            del self.open[number]
            return 204, {}
        self.open[number] += body
        if method == "PATCH":
            return 202, {"Location": f"/v2/{repository}/blobs/uploads/{number}?state=y"}
        data = bytes(self.open.pop(number))
        digest = _digest(data)
        if asked.get("digest") != [digest]:
            return 400, {}
        blobs[digest] = data
        self.has.add((repository, digest))
        return 201, {"Docker-Content-Digest": digest, "Location": f"/v2/{repository}/blobs/{digest}"}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
