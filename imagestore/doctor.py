"""Whether all that is recorded is there and is what it says: blobs by their digests, layers by their inodes, records.

    check   reads every byte of every blob that an image names, and looks at every layer
    cure    throws away what is damaged, and has it fetched again from the registry that it came from

Blocking but for `cure`'s fetching, which is the caller's. Refuses to remove a layer that a container stands on.
Invariant: `check` changes nothing; what `cure` removes was found damaged a moment before.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence

from imagestore.config import StoreConfig
from imagestore.content import Blobs, errno_text
from imagestore.indexes import below
from imagestore.layout import Layout
from imagestore.model import ContentInvalid, Descriptor, Unpacker
from imagestore.reach import Contents
from imagestore.records import ImageRecord, Records
from imagestore.reference import Reference, parse
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """`kind` is "blob", "layer", "image", "snapshot" or "record", `name` what it is about, `image` the id of one that
    needs it."""

    kind: str
    name: str
    what: str
    image: str = ""


class Doctor:
    """The doctor of one store."""

    def __init__(
        self,
        blobs: Blobs,
        records: Records,
        layout: Layout,
        unpacker: Unpacker,
        contents: Callable[[Descriptor], Contents | None],
        config: StoreConfig,
    ) -> None:
        self._blobs, self._records, self._layout = blobs, records, layout
        self._unpacker, self._contents, self._config = unpacker, contents, config

    def check(self) -> list[Problem]:
        """Everything that is wrong. Takes as long as reading the blobs does."""
        found = self.records()
        seen: dict[str, str] = {}
        broken = dict(self._unpacker.damaged_layers())
        found += [Problem("snapshot", key, what) for key, what in self._unpacker.damaged_snapshots()]
        for record in self._records.images():
            found += self._image(record, seen, broken)
        return found

    def records(self) -> list[Problem]:
        """What is wrong with the records themselves."""
        found = [Problem("record", "database", what) for what in self._records.damage()]
        if not self._layout.is_published(self._records.entries()):
            found.append(Problem("record", "index.json", "does not tell what is recorded"))
        return found

    def _image(self, record: ImageRecord, seen: dict[str, str], broken: dict[str, str]) -> list[Problem]:
        found = []
        for manifest in {one.digest: one for one in (record.manifest, *(n.manifest for n in record.names))}.values():
            wrong = self._blob(manifest, seen)
            if wrong:
                found.append(Problem("blob", manifest.digest, wrong, record.id))
                continue
            contents = self._contents(manifest)
            if contents is None:
                found.append(Problem("image", record.id, "its config is damaged or gone", record.id))
                continue
            for layer in contents.layers:
                unpacked = self._unpacker.has_layer(layer.chain_id)
                wrong = self._blob(layer.blob, seen) if self._config.keep_blobs or not unpacked else ""
                if wrong:
                    found.append(Problem("blob", layer.blob.digest, wrong, record.id))
                if not unpacked:
                    found.append(Problem("layer", layer.chain_id, "is not unpacked", record.id))
                elif layer.chain_id in broken:
                    found.append(Problem("layer", layer.chain_id, broken[layer.chain_id], record.id))
        told = {problem.name for problem in found}
        for blob in (blob for index in record.indexes for blob in below(index, self._blobs, self._config)):
            wrong = self._blob(blob, seen)
            if wrong and blob.digest not in told:
                told.add(blob.digest)
                found.append(Problem("blob", blob.digest, wrong, record.id))
        return found

    def _blob(self, blob: Descriptor, seen: dict[str, str]) -> str:
        """What is wrong with a blob, "" when nothing is."""
        if blob.digest not in seen:
            seen[blob.digest] = self._look(blob)
        return seen[blob.digest]

    def _look(self, blob: Descriptor) -> str:
        try:
            fd = os.open(self._blobs.path(blob.digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return "is gone"
        except OSError as error:
            return errno_text(error)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            return "is no regular file"
        with open(fd, "rb", buffering=0) as file:
            size = status.st_size
            if size != blob.size:
                return f"has {size} bytes, expected {blob.size}"
            try:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                return errno_text(error)
        return "" if digest == blob.digest[7:] else f"has the content of sha256:{digest}"

    def discard(self, problems: Sequence[Problem]) -> list[Problem]:
        """Throws away what is damaged, so that it is fetched again; what stays as it is: layers that containers hold,
        and containers' own snapshots, which nobody has a second time."""
        for problem in problems:
            if problem.kind == "blob":
                try:
                    self._blobs.remove(problem.name)
                except (OSError, ContentInvalid):
                    continue  # fetching it will say what is wrong
        layers = frozenset(problem.name for problem in problems if problem.kind == "layer")
        held = set(self._unpacker.forget_layers(layers)) if layers else set()
        return [problem for problem in problems if problem.name in held or problem.kind == "snapshot"]

    def origins(self, image_id: str) -> list[Reference]:
        """Where an image came from: each repository with the digest that it was served under."""
        for record in self._records.images():
            if record.id == image_id:
                served = {(name.repository, name.served) for name in record.names if name.served}
                return [parse(f"{repository}@{digest}") for repository, digest in sorted(served)]
        return []
