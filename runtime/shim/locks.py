"""Helpers as their shim sees them, and which of them works on which container.

Refuses to time a wait: who waits does that itself. Invariant: at most one helper works on a container, those that wait
get their turn in the order in which they came, and one that is gone holds nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable

    from runtime.shim.attach import Attachment
    from runtime.shim.waiting import Command


class Helper:
    """A forked helper."""

    __slots__ = ("attachment", "command", "end", "on_gone", "pid", "starts")

    def __init__(self, pid: int, end: Socket, on_gone: Callable[[], None] | None) -> None:
        self.pid = pid
        self.end = end
        self.on_gone = on_gone
        self.starts = False  # a container, once it has the lock
        self.attachment: Attachment | None = None
        self.command: Command | None = None  # that it has handed over, or become


class Locks:
    """One for each container. `granted(helper, id)` is called for who had to wait, `freed(id)` when one is done."""

    def __init__(self, granted: Callable[[Helper, str], None], freed: Callable[[str], None]) -> None:
        self._granted = granted
        self._freed = freed
        self._queues: dict[str, list[Helper]] = {}  # the first has it, the others wait for it

    def ask(self, helper: Helper, container_id: str) -> bool:
        """True if it has the lock now; otherwise it is told later."""
        queue = self._queues.setdefault(container_id, [])
        queue.append(helper)
        return queue[0] is helper

    def holder(self, container_id: str) -> Helper | None:
        """Who has it."""
        queue = self._queues.get(container_id)
        return None if queue is None else queue[0]

    def free(self, helper: Helper) -> None:
        """What it has, and what it waits for."""
        for container_id, queue in list(self._queues.items()):
            if helper in queue:
                self._take_out(helper, container_id, queue)

    def _take_out(self, helper: Helper, container_id: str, queue: list[Helper]) -> None:
        held_it = queue[0] is helper
        queue.remove(helper)
        if not queue:
            del self._queues[container_id]
        elif held_it:
            self._granted(queue[0], container_id)
        if held_it:
            self._freed(container_id)
