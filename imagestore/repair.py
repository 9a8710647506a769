"""What the doctor found damaged is thrown away and fetched again, from where the image came.

For the store's event loop. Refuses, as the doctor does, to take away what a container stands on. Invariant: nothing is
removed that was not found damaged; what is fetched is the very image, or it is not repaired.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from imagestore.catalog import Catalog
from imagestore.doctor import Doctor, Problem
from imagestore.frame import Frame
from imagestore.manifest import platform_of
from imagestore.model import ImageError, ProgressFunction
from imagestore.platforms import Platform
from imagestore.pull import Held
from imagestore.records import Records
from imagestore.reference import Reference
from imagestore.scopes import in_registry
from imagestore.transport import preload


class Repair:
    """That of one store."""

    def __init__(self, frame: Frame, doctor: Doctor, records: Records, catalog: Catalog) -> None:
        self._frame, self._doctor, self._records, self._catalog = frame, doctor, records, catalog

    async def run(self, problems: Sequence[Problem], tell: ProgressFunction) -> Sequence[Problem]:
        """What is still wrong then, with the reason. Raises ImageError."""
        left = list(await asyncio.to_thread(self._doctor.discard, problems))
        self._catalog.forget()
        for image_id in dict.fromkeys(problem.image for problem in problems if problem.image):
            why = await self._image(image_id, tell)
            if why:
                left.append(Problem("image", image_id, why, image_id))
        await asyncio.to_thread(self._records.publish)
        return [*left, *await asyncio.to_thread(self._doctor.records)]

    async def _image(self, image_id: str, tell: ProgressFunction) -> str:
        """ "" or why it could not be fetched again."""
        record = await asyncio.to_thread(self._records.by_id, image_id.removeprefix("sha256:"))
        everything = record is not None and bool(record.indexes)
        contents = await asyncio.to_thread(self._catalog.contents, record.manifest) if record else None
        platform = platform_of(contents.config) if contents and not contents.artifact else None
        said = []
        for origin in await asyncio.to_thread(self._doctor.origins, image_id):
            try:
                if await self._fetch(origin, platform, tell, everything=everything) == image_id:
                    return ""
                said.append(f"{origin} is another image now")
            except ImageError as error:
                said.append(str(error))
        return "; ".join(said) or "it came from no registry, so it cannot be fetched again"

    async def _fetch(
        self, origin: Reference, platform: Platform | None, tell: ProgressFunction, *, everything: bool
    ) -> str:
        """The id of what is there."""
        frame = self._frame

        async def work(held: Held) -> str:
            requirements = await frame.threads.io(frame.trust.before, in_registry(origin))
            await frame.threads.io(preload)
            async with frame.transport.open():
                source = await frame.source(origin, None)
                gate = frame.gate(source, requirements)
                return (await frame.puller.run(source, held, tell, gate.admit, everything=everything)).image_id

        return await frame.session(work, platform=platform)
