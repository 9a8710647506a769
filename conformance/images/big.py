"""The large image of the pull measurement: six layers, 1.18 GiB in 73,000 files, 317 MiB as gzip, one layer with three
quarters of it. Made from a fixed seed: text that compresses as source code does, with a share of noise in each file.

Takes about half a minute the first time and half a GiB in .cache for good.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from conformance.images.layer import Entry, Layer, directory, file, write_layer
from conformance.images.layout import Config, Layout

NAME = "big:1"
MIB = 1 << 20
# (MiB unpacked, files) from the base up; together 1.18 GiB and 73,000 files.
SHAPE = ((124, 8_000), (64, 5_000), (886, 51_000), (84, 6_000), (40, 2_500), (10, 500))
# The share of each file that does not compress; with this text it makes 3.8 : 1 for the whole.
NOISE = 0.04
# The share of lines that repeat one of the last so many.
ALIKE, REACH = 0.7, 100
POOL = 4 * MIB
FILES_PER_DIRECTORY = 40


def _text(source: random.Random) -> bytes:
    """Lines of words whose frequencies fall off as in real text; many lines are like one shortly before."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(source.choices(letters, k=source.randint(3, 12))) for _ in range(3000)]
    weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(len(words))))
    chosen = iter(source.choices(words, cum_weights=weights, k=POOL // 4))
    lines: list[str] = []
    size = 0
    while size < POOL:
        if len(lines) > REACH and source.random() < ALIKE:
            line = f"{lines[-source.randrange(1, REACH)][:72]} {next(chosen)}"
        else:
            line = "    " * source.randint(0, 3) + " ".join(itertools.islice(chosen, source.randint(4, 12)))
        lines.append(line)
        size += len(line) + 1
    return "\n".join(lines).encode()[:POOL]


def _entries(number: int, mebibytes: int, files: int) -> Iterator[Entry]:
    source = random.Random(number)
    text, noise = _text(source), source.randbytes(POOL)
    # A few large files and many small ones, as in a tree of packages.
    weights = [source.lognormvariate(0, 1.3) for _ in range(files)]
    scale = mebibytes * MIB / sum(weights)
    base = f"opt/layer{number}"
    yield directory("opt")
    yield directory(base)
    for index, weight in enumerate(weights):
        folder = f"{base}/package{index // FILES_PER_DIRECTORY:04}"
        if index % FILES_PER_DIRECTORY == 0:
            yield directory(folder)
        size = min(int(weight * scale), POOL // 2)
        hard = int(size * NOISE)
        start = source.randrange(POOL // 2)
        yield file(f"{folder}/module{index:05}.py", noise[start : start + hard] + text[start : start + size - hard])


def _layer(arguments: tuple[int, int, int, Path]) -> Layer:
    number, mebibytes, files, path = arguments
    return write_layer(_entries(number, mebibytes, files), path)


def big(cache: Path) -> Path:
    """The layout that holds the image, built now or earlier."""
    target = cache / "images" / "big-1"
    if target.is_dir():
        return target
    work = target.with_name(f"{target.name}.{os.getpid()}")
    layout = Layout(work)
    tasks = [(number, *shape, layout.scratch() / str(number)) for number, shape in enumerate(SHAPE)]
    with ProcessPoolExecutor(2) as pool:
        # The largest first, so that the two processes end at about the same time.
        order = sorted(tasks, key=lambda task: -task[1])
        done = dict(zip((task[0] for task in order), pool.map(_layer, order), strict=True))
    layout.add_image(NAME, [done[number] for number in sorted(done)], Config(cmd=["/none"]))
    layout.finish()
    os.rename(work, target)
    return target
