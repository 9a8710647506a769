"""A container that has ended is started again, by a helper of its shim (runtime.shim.restarts says which and when).

The runtime forgets the process that was, with its cgroup, and makes the next one out of the same bundle, over the same
writable layer. Refuses what was retired since it was due. Invariant: what fails here ends the container, with the
failure as its message.
"""

from __future__ import annotations

import time

from runtime.errors import RuntimeFailure
from runtime.linux.files import remove_tree
from runtime.shim import protocol
from runtime.shim.handler import Handler
from runtime.shim.protocol import Facts
from runtime.shim.records import save_record
from runtime.shim.restarts import forget_exit
from runtime.shim.sandbox import unmount


class NextRun(Handler):
    """The work of one helper."""

    def begin(self, container_id: str) -> None:
        """Makes and starts the next process. Raises nothing: there is nobody to hear it."""
        self._lock(container_id, starts=True)
        told = self._channel.ask("again", container_id)
        if told is None:
            return
        message = protocol.ContainerMessage(**told)
        try:
            self._replace(message)
        except (RuntimeFailure, OSError) as error:
            self._channel.ask("note", container_id, f"start it again: {error}")
            self._channel.ask("retire", container_id)

    def _replace(self, message: protocol.ContainerMessage) -> None:
        engine = self._engine(message.handler)
        engine.delete(message.id)
        if message.handler:
            unmount(f"{message.bundle}/rootfs")
        forget_exit(message.bundle)
        _settle_volatile(message)
        self._make_recorded(message, engine, lambda stdio: engine.create(message, stdio), Facts(message.id))
        when_ns = time.time_ns()
        engine.start(message.id)
        value = self._channel.ask("started", message.id, when_ns)
        save_record(self._record(message.id), message.bundle, message.handler, Facts.from_json(value))


def _settle_volatile(message: protocol.ContainerMessage) -> None:
    """Overlayfs refuses to mount a volatile layer a second time, lest a crash of the machine has cut its files short.
    This process has seen none."""
    for key, value in message.options:
        if key == "workdir" and ["volatile", None] in message.options:
            remove_tree(f"{value}/work/incompat/volatile")
