"""The native runtime for pods with a user namespace: standard streams belong to the pod's root before they are used.

Refuses nothing of its own. Invariant: only pipes and sockets change hands, see runtime.shim.userns.give_pipes.
"""

from __future__ import annotations

from runtime.shim.engine import SILENT, Made, NativeEngine
from runtime.shim.userns import give_pipes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from runtime.entering import Caller
    from runtime.shim.engine import LastWords
    from runtime.shim.protocol import ContainerMessage, PodMessage


class MappedEngine(NativeEngine):
    """One pod's."""

    def __init__(self, root: str, pod: PodMessage) -> None:
        super().__init__(root)
        self._pod = pod

    def create(self, message: ContainerMessage, stdio: Sequence[int], last_words: LastWords = SILENT) -> Made:
        give_pipes(self._pod, stdio)
        return super().create(message, stdio, last_words)

    def execute(self, container_id: str, process: dict[str, Any], stdio: Sequence[int], caller: Caller) -> Made:
        give_pipes(self._pod, stdio)
        return super().execute(container_id, process, stdio, caller)
