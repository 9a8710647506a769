"""Progress of blobs on a terminal; nothing in a pipe. rich is imported when the first bar is drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imagestore.model import Progress


@contextmanager
def bars() -> Iterator[Callable[[Progress], None]]:
    """What is to be told of each step, while the block lasts."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Display

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    drawn: dict[str, TaskID] = {}
    with Display(*columns, console=Console(stderr=True), transient=True, refresh_per_second=8) as display:

        def show(step: Progress) -> None:
            label = f"{step.digest.removeprefix('sha256:')[:12]} {step.phase}"
            if step.digest not in drawn:
                drawn[step.digest] = display.add_task(label, total=step.total)
            display.update(drawn[step.digest], completed=step.done, total=step.total, description=label)

        yield show
