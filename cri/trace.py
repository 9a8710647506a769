"""What a call is about and where its time goes, for those who have asked to see it: spans, and ids for logs.

A leaf that everything of `cri` may use. Knows no OpenTelemetry: cri/observe brings that in when it is configured.
Invariant: with nothing configured a span and an `about` cost a look at one variable, and keep nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Protocol

from imagestore.model import ProgressFunction

# Name, the one that it is a part of or "", begin and end in ns since the epoch.
Phase = tuple[str, str, int, int]


class Tracer(Protocol):
    """cri.observe.tracing.Tracing."""

    def span(self, name: str, attributes: Mapping[str, str | int]) -> AbstractContextManager[object]:
        """Present until it is left; what begins in there is a part of it."""
        ...

    def phases(self, phases: Sequence[Phase]) -> None:
        """What is over already, as parts of the present span."""
        ...

    def ids(self) -> tuple[str, str]:
        """Trace and span of what is present, in hex; "" where there is none."""
        ...

    def present(self) -> object:
        """What `span_of` takes as the span above; None where there is none."""
        ...

    def span_of(self, above: object, name: str, attributes: Mapping[str, str | int]) -> AbstractContextManager[object]:
        """As `span`, of a call that has been answered meanwhile."""
        ...


class PullWatch(Protocol):
    """Sees what a pull does with each blob."""

    def tell(self) -> ProgressFunction:
        """What the pull tells its progress to."""
        ...

    def over(self) -> None:
        """The pull has ended, well or not."""
        ...


_NOTHING: AbstractContextManager[object] = contextlib.nullcontext()
_about: ContextVar[dict[str, str] | None] = ContextVar("about", default=None)
_tracer: Tracer | None = None
_watch_pull: Callable[[], PullWatch] | None = None


def configure(tracer: Tracer | None, watch_pull: Callable[[], PullWatch] | None) -> None:
    """Who sees spans and pulls from now on; None: nobody."""
    global _tracer, _watch_pull
    _tracer, _watch_pull = tracer, watch_pull


def tracer() -> Tracer | None:
    """Who sees spans."""
    return _tracer


def span(name: str, **attributes: str | int) -> AbstractContextManager[object]:
    """A part of the call that is being made, under `name`; `_` in the names of attributes becomes a dot."""
    if _tracer is None:
        return _NOTHING
    return _tracer.span(name, {key.replace("_", "."): value for key, value in attributes.items()})


def present() -> object:
    """The span that is present, for `span_of`; None where there is none."""
    return None if _tracer is None else _tracer.present()


def span_of(above: object, name: str, **attributes: str | int) -> AbstractContextManager[object]:
    """As `span`, for what goes on once the call that it belongs to, whose span was `present`, has been answered."""
    if _tracer is None or above is None:
        return _NOTHING
    return _tracer.span_of(above, name, {key.replace("_", "."): value for key, value in attributes.items()})


def phases(found: Sequence[Phase]) -> None:
    """What another process has kept of the time that the present span took."""
    if _tracer is not None:
        _tracer.phases(found)


@contextlib.contextmanager
def pull_watched() -> Iterator[ProgressFunction | None]:
    """What a pull is to tell its progress to, if anybody wants to know."""
    if _watch_pull is None:
        yield None
        return
    watch = _watch_pull()
    try:
        yield watch.tell()
    finally:
        watch.over()


# ---------------------------------------------------------------------------------------------------------- subjects


@contextlib.contextmanager
def scope(**ids: str) -> Iterator[dict[str, str]]:
    """About `ids` (pod, container): tasks and threads started in there know them, and what those add is known here."""
    known = {key: value for key, value in ids.items() if value}
    token = _about.set(known)
    try:
        yield known
    finally:
        _about.reset(token)


def about(**ids: str) -> None:
    """The call turns out to be about these, too. Outside of any `scope`: nothing."""
    known = _about.get()
    if known is not None:
        known.update(ids)


def subject() -> Mapping[str, str]:
    """What the present work is about."""
    return _about.get() or {}
