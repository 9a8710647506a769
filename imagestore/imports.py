"""Images of files into the store: an OCI layout, a tar of one, what `docker save` writes.

For the store's event loop. Refuses what imagestore.local refuses, and what the policy does not accept from there.
Invariant: that of a pull; the file is read as it is, nothing of it is kept by name.
"""

from __future__ import annotations

from pathlib import Path

from imagestore.frame import Frame
from imagestore.local import DirectoryFiles, DockerArchive, LocalSource, TarFiles, local_name
from imagestore.model import Image, ImageError, ProgressFunction, ReferenceInvalid
from imagestore.pull import Held
from imagestore.reference import parse
from imagestore.scopes import Subject, in_file
from imagestore.told import told
from imagestore.trust import Gate


class Imports:
    """Those of one store."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    async def layout(
        self, directory: Path, tag: str = "", name: str = "", progress: ProgressFunction | None = None, *, fd: int = -1
    ) -> Image:
        """The image of an OCI layout directory: the one named `tag` there, or its only one. It is called `name` here,
        by default what it is called there, or "localhost/DIRECTORY:TAG". With `fd`, which stays the caller's, that is
        the directory, and `directory` what it is called. Raises ImageError and its kinds."""
        threads, config = self._frame.threads, self._frame.config
        source = LocalSource(DirectoryFiles(directory, fd), f"layout {directory}", tag, threads, config)
        return await self._import(source, in_file("oci", directory), directory, tag, name, progress)

    async def archive(
        self,
        path: Path,
        tag: str = "",
        name: str = "",
        progress: ProgressFunction | None = None,
        *,
        docker: bool = False,
        fd: int = -1,
    ) -> Image:
        """As `layout`, from a tar of an OCI layout, or with `docker` from what `docker save` writes."""
        kind = DockerArchive if docker else LocalSource
        source = kind(TarFiles(path, fd), f"archive {path}", tag, self._frame.threads, self._frame.config)
        subject = in_file("docker-archive" if docker else "oci-archive", path)
        return await self._import(source, subject, path, tag, name, progress)

    async def _import(
        self,
        source: LocalSource,
        subject: Subject,
        path: Path,
        tag: str,
        name: str,
        progress: ProgressFunction | None,
    ) -> Image:
        if name and parse(name).digest:
            raise ReferenceInvalid(f"import {path}: {name!r} is a digest, expected a tag")
        frame = self._frame

        async def work(held: Held) -> Image:
            gate = Gate(frame.trust, subject, await frame.threads.io(frame.trust.before, subject), None)
            tell = frame.also(name or tag or str(path), progress or (lambda _: None))
            pulled = await frame.puller.run(source, held, tell, gate.admit)
            called = parse(name) if name else local_name(path, tag or source.name)
            return await frame.record(called, pulled, "", gate)

        try:
            return await frame.session(work)
        except ImageError as error:
            raise told(f"import {path}", error) from error
