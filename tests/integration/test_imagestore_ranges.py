"""A large layer over a slow line: several ranges at once, in order, whatever the server does; and limits on rates."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imagestore.model import ContentInvalid, RegistryUnavailable
from imagestore.rate import Rate
from tests.fakes.imagestore import Bench, run
from tests.fakes.registry import Cut, FakeRegistry, Hang, NoRange, Reply, Spoil, Stall, WrongRange, build_image
from tests.support import eventually

STEP = 64 << 10
BIG = os.urandom(30 * STEP + 12_345)
EAGER: dict[str, Any] = {
    "ranges": 3,
    "range_bytes": STEP,
    "range_after_s": 0.0,
    "range_below": 1e18,
    "batch_bytes": STEP,
}


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Every download counts as slow at once."""
    opened = Bench(tmp_path, **EAGER)
    yield opened
    opened.close()


def parts(registry: FakeRegistry, digest: str) -> list[tuple[int, int]]:
    """What was asked for with both ends."""
    found = []
    for seen in registry.seen:
        match = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", seen.headers.get("Range", ""))
        if match and seen.path.endswith(digest):
            found.append((int(match[1]), int(match[2]) + 1))
    return found


def pushed(registry: FakeRegistry) -> tuple[str, str]:
    """A reference, and the digest of its large layer; uncompressed, so that its size is known."""
    image = build_image([{"big": BIG}], compression="")
    return registry.add("app", "1", image), image.layer_digests[0]


def test_the_rest_comes_in_parts(bench: Bench, registry: FakeRegistry) -> None:
    reference, layer = pushed(registry)
    bench.pull(reference)
    asked = parts(registry, layer)
    assert len(asked) > 20 and all(end - begin <= STEP for begin, end in asked)
    # All that the first stream had not brought, without a gap and without a byte twice.
    assert [begin for begin, _ in sorted(asked)][1:] == [end for _, end in sorted(asked)][:-1]
    assert sorted(asked)[-1][1] == len(registry.blobs[layer])
    assert (bench.root / "blobs/sha256" / layer[7:]).read_bytes() == registry.blobs[layer]


_PULL_IN_A_PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.integration.test_imagestore_ranges import EAGER, Bench
Bench(Path(sys.argv[2]), **EAGER, stall_timeout_s=60.0).pull(sys.argv[3])
"""


def test_o45_killed_between_parts(tmp_path: Path, registry: FakeRegistry) -> None:
    """What had come in order is kept, and nothing of it is asked for again."""
    reference, layer = pushed(registry)
    hang = registry.rule("GET", f"/blobs/{layer}", Hang(), times=0)
    original = registry._right

    def right(request: object) -> Reply:
        hang.times = 100 if len(parts(registry, layer)) > 9 else 0  # those that come next are never answered
        return original(request)  # type: ignore[arg-type]

    registry._right = right  # type: ignore[method-assign,assignment]
    tree = str(Path(__file__).parents[2])
    child = subprocess.Popen([sys.executable, "-c", _PULL_IN_A_PROCESS, tree, str(tmp_path), reference])
    part = tmp_path / "images/ingest" / f".{layer[7:]}.part"
    try:
        eventually(lambda: hang.hits == 3 and part.stat().st_size > 5 * STEP)
    finally:
        child.kill()
        child.wait()
    kept = part.stat().st_size
    assert kept < len(registry.blobs[layer])
    registry.heal()
    registry._right = original  # type: ignore[method-assign]
    registry.seen.clear()
    bench = Bench(tmp_path, **EAGER)
    try:
        bench.pull(reference)
        first = next(seen.headers["Range"] for seen in registry.seen if seen.path.endswith(layer))
        assert first == f"bytes={kept}-"
        assert min(begin for begin, _ in parts(registry, layer)) > kept
        assert (bench.root / "blobs/sha256" / layer[7:]).read_bytes() == registry.blobs[layer]
    finally:
        bench.close()


def test_what_waits_is_bounded(bench: Bench, registry: FakeRegistry) -> None:
    """The first part hangs: as many are fetched as may wait for it, and then nothing until it is tried again."""
    reference, layer = pushed(registry)
    hang = registry.rule("GET", f"/blobs/{layer}", Hang(), times=0)
    original = registry._right

    def right(request: object) -> Reply:
        if registry.count("GET", f"/blobs/{layer}") == 1:
            hang.times = 1  # this is the stream; the next request for the layer is the first part
        return original(request)  # type: ignore[arg-type]

    registry._right = right  # type: ignore[method-assign,assignment]
    bench.pull(reference)
    asked = parts(registry, layer)
    again = asked.index(asked[0], 1)
    assert len(set(asked[1:again])) == 2 * 3 - 1
    assert (bench.root / "blobs/sha256" / layer[7:]).read_bytes() == registry.blobs[layer]


def test_a_quick_line_stays_one_stream(tmp_path: Path, registry: FakeRegistry) -> None:
    bench = Bench(tmp_path)
    reference, layer = pushed(registry)
    bench.pull(reference)
    assert parts(registry, layer) == [] and registry.count("GET", f"/blobs/{layer}") == 1
    bench.close()


def test_parts_that_break_off_go_on(bench: Bench, registry: FakeRegistry) -> None:
    reference, layer = pushed(registry)
    cut = registry.rule("GET", f"/blobs/{layer}", Cut(STEP // 3), times=0)
    original = registry._right

    def right(request: object) -> Reply:
        number = len(parts(registry, layer))
        cut.times = cut.hits + (1 if number and number % 5 == 0 else 0)
        return original(request)  # type: ignore[arg-type]

    registry._right = right  # type: ignore[method-assign,assignment]
    bench.pull(reference)
    assert cut.hits >= 3
    assert (bench.root / "blobs/sha256" / layer[7:]).read_bytes() == registry.blobs[layer]


@pytest.mark.parametrize("action", [NoRange(), WrongRange(-7), WrongRange(7), Reply(416)])
def test_o49_servers_that_do_ranges_wrong(bench: Bench, registry: FakeRegistry, action: object) -> None:
    """The first request gets the right stream; those for ranges are answered with something else, once or always."""
    reference, layer = pushed(registry)
    rule = registry.rule("GET", f"/blobs/{layer}", action, times=0)  # type: ignore[arg-type]
    original = registry._right

    def right(request: object) -> Reply:
        if parts(registry, layer):
            rule.times = max(rule.times, 3)
        return original(request)  # type: ignore[arg-type]

    registry._right = right  # type: ignore[method-assign,assignment]
    bench.pull(reference)
    assert rule.hits
    assert (bench.root / "blobs/sha256" / layer[7:]).read_bytes() == registry.blobs[layer]


def test_spoiled_parts_are_never_kept(bench: Bench, registry: FakeRegistry) -> None:
    reference, layer = pushed(registry)
    registry.rule("GET", f"/blobs/{layer}", Spoil())
    with pytest.raises(ContentInvalid, match="wrong content"):
        bench.pull(reference)
    assert layer not in bench.blobs() and not bench.strays()


def test_a_line_that_dies_leaves_a_prefix(bench: Bench, registry: FakeRegistry) -> None:
    reference, layer = pushed(registry)
    gone = registry.rule("GET", f"/blobs/{layer}", Reply(503), times=0)
    original = registry._right

    def right(request: object) -> Reply:
        if len(parts(registry, layer)) > 10:
            gone.times = 1 << 30
        return original(request)  # type: ignore[arg-type]

    registry._right = right  # type: ignore[method-assign,assignment]
    with pytest.raises(RegistryUnavailable):
        bench.pull(reference)
    (partial,) = bench.ingests()
    kept = (bench.root / "ingest" / partial).read_bytes()
    assert kept and registry.blobs[layer].startswith(kept)
    registry._right = original  # type: ignore[method-assign]
    registry.heal()
    bench.pull(reference)


def test_a_cancelled_pull_ends_every_part(bench: Bench, registry: FakeRegistry) -> None:
    reference, layer = pushed(registry)
    stalled = registry.rule("GET", f"/blobs/{layer}", Stall(1000), times=0)
    original = registry._right

    def right(request: object) -> Reply:
        if parts(registry, layer):
            stalled.times = 1 << 30
        return original(request)  # type: ignore[arg-type]

    registry._right = right  # type: ignore[method-assign,assignment]

    async def work() -> None:
        pull = asyncio.create_task(bench.store.pull(reference))
        while stalled.hits < 3:
            await asyncio.sleep(0.01)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        assert {task for task in asyncio.all_tasks() if task is not asyncio.current_task()} == set()

    run(work())


# --------------------------------------------------------------------------------------------------------------- rates


def test_no_more_than_the_rate() -> None:
    """Lower bounds on time only: a busy machine is slower, never quicker."""

    async def work() -> float:
        rate = Rate(10_000_000)
        began = time.monotonic()
        await asyncio.gather(*(take(rate) for _ in range(4)))
        return time.monotonic() - began

    async def take(rate: Rate) -> None:
        for _ in range(10):
            await rate.take(100_000)

    # 4 MB at 10 MB/s, of which a tenth of a second's worth may go at once.
    assert asyncio.run(work()) >= 0.25


@pytest.mark.parametrize("key", ["bandwidth_bytes", "pull_bandwidth_bytes"])
def test_a_pull_is_held_back(tmp_path: Path, registry: FakeRegistry, key: str) -> None:
    bench = Bench(tmp_path, stall_timeout_s=20.0, **{key: 4_000_000})
    reference, _ = pushed(registry)
    began = time.monotonic()
    bench.pull(reference)
    assert time.monotonic() - began >= len(BIG) / 4_000_000 - 0.15
    bench.close()


def test_one_pull_does_not_take_all_turns(tmp_path: Path, registry: FakeRegistry) -> None:
    """Two layers at once for each pull, three for the node."""
    bench = Bench(tmp_path, concurrent_downloads=2, node_downloads=3)
    references = [
        registry.add(f"app{n}", "1", build_image([{f"{n}{m}": os.urandom(30_000)} for m in range(6)])) for n in range(3)
    ]
    bench.pull(references[0])
    assert registry.most_concurrent <= 2
    registry.most_concurrent = 0

    async def both() -> None:
        await asyncio.gather(*(bench.store.pull(reference) for reference in references[1:]))

    run(both())
    assert registry.most_concurrent <= 3
    bench.close()
