"""imagestore.threads: what becomes of a disk call that nobody waits for any more."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest

from imagestore.threads import Threads


def test_an_abandoned_call_that_fails_is_not_printed() -> None:
    """As when two layers meet a full disk: one failure is told, the other is nobody's."""
    printed: list[dict[str, Any]] = []
    go_on = threading.Event()

    def fail() -> None:
        go_on.wait(10)
        raise OSError("no space")

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: printed.append(context))
        gc.freeze()  # what other tests hold need not be looked through
        threads = Threads(1, 1, 1)
        threads.enter()
        threads.start_io(fail)
        after = threads.start_io(lambda: None)  # the only thread does it once the other has failed
        go_on.set()
        await after
        with pytest.raises(OSError, match="no space"):
            await threads.io(fail)
        threads.leave()
        gc.collect()

    asyncio.run(scenario())
    assert printed == []
