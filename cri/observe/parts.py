"""The parts with a span around each of their steps that takes time: what a call is made of.

Only where traces are configured; otherwise the verbs have the parts themselves. Refuses to change anything: arguments,
results and failures pass through. Invariant: a step outside of any call, such as the daemon's own measuring, has none.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from cri import trace
from cri.node import Parts

_STEPS = {
    "images": ("pull", "remove"),
    "snapshots": ("prepare", "unpack", "remove"),
    "sandboxes": ("start", "reconnect", "rejoin", "stop"),
    "containers": ("create", "start_container", "signal", "delete", "exec_sync", "update", "reopen_log"),
    "checkpoints": ("pause", "resume", "checkpoint", "restore"),
    "network": ("new_netns", "add", "check", "delete", "remove_netns"),
}
_WORDS = {"sandboxes": "shim", "containers": "shim", "checkpoints": "shim", "images": "image", "snapshots": "snapshot"}


class _Traced:
    """A part. What is no step is the part's own."""

    def __init__(self, part: object, word: str, steps: tuple[str, ...]) -> None:
        self._part = part
        for step in steps:
            setattr(self, step, _with_span(getattr(part, step), f"{word}.{step}"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _with_span(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def awaited(*args: object, **kwargs: object) -> object:
            with trace.span(name):
                return await method(*args, **kwargs)

        return awaited

    @functools.wraps(method)
    def called(*args: object, **kwargs: object) -> object:
        with trace.span(name):
            return method(*args, **kwargs)

    return called


def traced(parts: Parts) -> Parts:
    """The same parts, with spans."""
    found = {kind: _Traced(getattr(parts, kind), _WORDS.get(kind, kind), steps) for kind, steps in _STEPS.items()}
    return Parts(**cast("dict[str, Any]", found))
