"""Window sizes as clients send them: JSON objects {"Width": …, "Height": …}, one after the other, however they are cut.

Refuses what grows without becoming an object. Invariant: what is no size changes nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

from cri.streaming.wire import ProtocolError, Stream

_MAX_OBJECT = 4096


async def follow_sizes(stream: Stream, apply: Callable[[tuple[int, int]], Any]) -> None:
    """Calls `apply` with rows and columns of each; what it returns is awaited, if there is anything."""
    decoder = json.JSONDecoder()
    text = ""
    while data := await stream.read():
        text = (text + data.decode("utf-8", "replace")).lstrip()
        while text:
            try:
                value, end = decoder.raw_decode(text)
            except ValueError:
                break
            text = text[end:].lstrip()
            size = _size(value)
            if size is not None:
                with contextlib.suppress(OSError):  # the terminal has gone
                    pending = apply(size)
                    if pending is not None:
                        await pending
        if len(text) > _MAX_OBJECT:
            raise ProtocolError(f"read a resize: no object in {len(text)} bytes")


def _size(value: object) -> tuple[int, int] | None:
    """Rows and columns; None for what is no size."""
    if not isinstance(value, dict):
        return None
    rows, columns = value.get("Height"), value.get("Width")
    if all(type(number) is int and 0 <= number < 65536 for number in (rows, columns)):
        return rows, columns  # type: ignore[return-value]  # looked at just now
    return None
