"""How fast a big layer unpacks here: builds one like peers.md's (239 MiB gzip, 886 MiB, 51 k files) and times it.

Not part of the suite. `python -m conformance.bench_unpack [--directory DIR] [--layers N]` keeps the blob in DIR and
prints seconds for inflating alone, for one unpack in this process, and for whole images through Overlay's workers.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import random
import sqlite3
import tarfile
import threading
import time
import zlib
from pathlib import Path

from runtime.linux.files import remove_tree
from runtime.linux.writeback import syncfs
from snapshotter.arriving import Reader
from snapshotter.inflate import inflate
from snapshotter.layout import spread
from snapshotter.model import Config, Limits
from snapshotter.overlay import Overlay
from snapshotter.unpack import unpack

# So many words of random bytes give gzip -1 the ratio of that layer.
WORDS = 180
MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


def build(path: Path, files: int, total: int, seed: int) -> str:
    """Writes a gzip'ed tar whose files have a distribution's sizes and compress about 3.7 to 1; returns its diff id."""
    dice = random.Random(seed)
    # Text-like blocks: words from a small vocabulary, so that deflate has matches and literals as in real files.
    vocabulary = [dice.randbytes(dice.randint(2, 12)) for _ in range(WORDS)]
    pool = b"".join(dice.choices(vocabulary, k=1_500_000))
    sizes = [min(int(dice.lognormvariate(7.9, 1.9)), 60 << 20) for _ in range(files)]
    scale = total / sum(sizes)
    digest = hashlib.sha256()

    class Tee(io.RawIOBase):
        def __init__(self, out: gzip.GzipFile) -> None:
            self.out = out

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            digest.update(data)
            self.out.write(data)
            return len(data)

    with gzip.GzipFile(path, "wb", compresslevel=1, mtime=0) as out:
        with tarfile.open(fileobj=Tee(out), mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as archive:
            for number, size in enumerate(sizes):
                if number % 8 == 0:
                    directory = tarfile.TarInfo(f"usr/lib/p{number // 800}/d{number // 8}")
                    directory.type, directory.mode, directory.mtime = tarfile.DIRTYPE, 0o755, 1_700_000_000
                    archive.addfile(directory)
                info = tarfile.TarInfo(f"{directory.name}/file-{number}.so")
                info.size = int(size * scale)
                info.mode, info.mtime = 0o755 if number % 9 == 0 else 0o644, 1_700_000_000 + number
                start = dice.randrange(len(pool))
                data = (pool[start:] + pool * (info.size // len(pool) + 1))[: info.size]
                archive.addfile(info, io.BytesIO(data))
    return f"sha256:{digest.hexdigest()}"


def timed(what: str, start: float) -> None:
    print(f"{what:<48} {time.monotonic() - start:6.2f} s", flush=True)


def blobs(directory: Path, count: int) -> list[tuple[Path, str]]:
    """The big layer and `count` - 1 smaller ones, built once."""
    made = []
    for number in range(count):
        path, note = directory / f"layer{number}.tgz", directory / f"layer{number}.diffid"
        if not note.exists():
            files, total = (51_000, 886 << 20) if number == 0 else (4_400, 64 << 20)
            note.write_text(build(path, files, total, number))
        made.append((path, note.read_text()))
        print(f"{path}: {path.stat().st_size >> 20} MiB")
    return made


def alone(path: Path, diff_id: str, scratch: Path) -> None:
    """Inflating, inflating with SHA-256, and one unpack in this process."""
    for hashed in (False, True):
        fd, start, digest = os.open(path, os.O_RDONLY), time.monotonic(), hashlib.sha256()
        for chunk in inflate(Reader(fd, os.fstat(fd).st_size), MEDIA_TYPE, Limits()):
            if hashed:
                digest.update(chunk)
        timed("inflate + sha256" if hashed else "inflate", start)
        os.close(fd)
    spread(scratch)
    target = scratch / f"one.{os.getpid()}"
    target.mkdir()
    before = os.umask(0)
    blob, layer = os.open(path, os.O_RDONLY), os.open(target, os.O_RDONLY)
    start = time.monotonic()
    result = unpack(Reader(blob, path.stat().st_size), layer, MEDIA_TYPE, diff_id, Limits(), base=True)
    timed(f"unpack, {result.extracted.inodes} inodes", start)
    start = time.monotonic()
    syncfs(layer)
    timed("syncfs", start)
    os.umask(before)
    os.close(blob)
    os.close(layer)
    start = time.monotonic()
    remove_tree(target)
    timed("remove", start)


def whole(layers: list[tuple[Path, str]], scratch: Path) -> None:
    """All layers through Overlay, at once, durable."""
    db = sqlite3.connect(scratch / "db", check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    overlay = Overlay(scratch / "root", db, Config())
    start = time.monotonic()
    threads, parent = [], None
    for number, (path, diff_id) in enumerate(layers):
        chain = f"sha256:{zlib.crc32(diff_id.encode()):064x}"
        threads.append(threading.Thread(target=overlay.unpack_layer, args=(path, MEDIA_TYPE, diff_id, chain, parent)))
        threads[-1].start()
        parent = chain
        timed(f"  layer {number} asked for", start)
    for thread in threads:
        thread.join()
    timed(f"image of {len(layers)} layers, durable", start)
    overlay.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp/ocid-bench-unpack"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", choices=["alone", "whole"])
    arguments = parser.parse_args()
    arguments.directory.mkdir(exist_ok=True)
    layers = blobs(arguments.directory, arguments.layers)
    scratch = arguments.directory / f"scratch.{os.getpid()}"
    scratch.mkdir()
    try:
        if arguments.only != "whole":
            alone(*layers[0], scratch)
        if arguments.only != "alone":
            whole(layers, scratch)
    finally:
        remove_tree(scratch)


if __name__ == "__main__":
    main()
