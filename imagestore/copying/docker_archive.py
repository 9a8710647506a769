"""What `docker load` reads: manifest.json, configs as HEX.json, layers as plain tars named by their diff ids.

Refuses artifacts: docker has no word for them. Invariant: several images may be put into one archive, each under its
names; the file is there when all of it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagestore.config import StoreConfig
from imagestore.copying.contents import Contents, encode, read
from imagestore.copying.targets import Report, archive, move
from imagestore.manifest import DOCKER_MANIFEST
from imagestore.model import Descriptor, ImageError
from imagestore.registry import Document
from imagestore.threads import Threads


class DockerArchiveTarget:
    """`scratch` holds the blobs until `finish`. Before each image `called` says what it is called."""

    format_type = DOCKER_MANIFEST
    layers: str | None = ""

    def __init__(self, file: Path, scratch: Path, threads: Threads, config: StoreConfig) -> None:
        self._file, self._scratch = file, scratch
        self._threads, self._config = threads, config
        self._images: list[tuple[Contents, tuple[str, ...]]] = []
        self._names: tuple[str, ...] = ()

    def called(self, names: tuple[str, ...]) -> None:
        """The tags of the next image."""
        self._names = names

    async def has(self, blob: Descriptor) -> bool:
        return await self._threads.io((self._scratch / blob.digest[7:]).exists)

    async def put(self, blob: Descriptor, path: Path, report: Report) -> None:
        await self._threads.io(move, path, self._scratch / blob.digest[7:])
        report(blob.size)

    async def manifest(self, document: Document, top: bool) -> None:
        contents = read(document, self._config)
        if contents.is_index or not top:
            raise ImageError("a docker-archive holds images of one platform: choose one (--platform)")
        self._images.append((contents, self._names))

    async def finish(self) -> None:
        await self._threads.io(self._write)

    def _write(self) -> None:
        listed: list[dict[str, Any]] = []
        with archive(self._file) as tar:
            for contents, names in self._images:
                config = contents.config
                assert config is not None
                tar.add_file(f"{config.digest[7:]}.json", self._scratch / config.digest[7:])
                for layer in contents.layers:
                    tar.add_file(f"{layer.digest[7:]}.tar", self._scratch / layer.digest[7:])
                listed.append(
                    {
                        "Config": f"{config.digest[7:]}.json",
                        "RepoTags": list(names) or None,
                        "Layers": [f"{layer.digest[7:]}.tar" for layer in contents.layers],
                    }
                )
            tar.add("manifest.json", encode(listed))
