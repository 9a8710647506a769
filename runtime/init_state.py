"""What an init is given, and what it gathers on the way: the values that runtime/init.py's steps work on.

Refuses logic. Invariant: `Setup` is made by the caller of create and inherited over the clone, so none of it is ever
encoded; `Init` lives in the new process only.
"""

from __future__ import annotations

from runtime import process, rootfs, sync
from runtime.errors import RuntimeFailure
from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable, Mapping

    from runtime.cgroups.manager import Gate
    from runtime.linux.progress import Progress
    from runtime.spec import Spec
    from runtime.spec_process import Process


class Setup:
    """All that the caller prepared for the init; inherited over the fork, so nothing of it is ever encoded."""

    def __init__(
        self,
        *,
        id: str,
        spec: Spec,
        process: Process,
        bundle: str,
        root_path: str,
        root_tree: int,
        sources: dict[int, int],
        make_root: Callable[[], int],
        joins: list[tuple[int, int]],
        gate: Gate | None,
        cgroups: Mapping[str, str],
        stdio: tuple[int, int, int],
        preserve_fds: int,
        no_pivot: bool,
        no_new_keyring: bool,
        in_user_namespace: bool,
        dumpable: bool,
        listener: _socket.socket,
        filter: Callable[[], int] | None,
        memory_policy: Callable[[], None] | None,
        state: Callable[[int, str], bytes],
        progress: Progress,
        stays_behind: bool,
        end_by_signals: Callable[[], None],
    ) -> None:
        self.id = id
        self.spec = spec
        self.process = process
        self.bundle = bundle
        self.root_path = root_path
        self.root_tree = root_tree
        self.sources = sources
        self.make_root = make_root
        self.joins = joins
        self.gate = gate
        self.cgroups = cgroups
        self.stdio = stdio
        self.preserve_fds = preserve_fds
        self.no_pivot = no_pivot
        self.no_new_keyring = no_new_keyring
        # mknod(2) is forbidden there, and more; whether the container has made it, joined it, or ocirun runs in one.
        self.in_user_namespace = in_user_namespace
        # Only for a caller that has no rights over the init otherwise, runtime/rootless.py.
        self.dumpable = dumpable
        self.listener = listener
        self.filter = filter
        self.memory_policy = memory_policy
        self.state = state
        self.progress = progress
        # The init is PID 1 for the command, which it forks, runtime/reaper.py.
        self.stays_behind = stays_behind
        self.end_by_signals = end_by_signals


class Init:
    """The state of one start, inside the new process."""

    def __init__(self, setup: Setup, channel: sync.Channel) -> None:
        self.setup = setup
        self.spec = setup.spec
        self.process = setup.process
        self.channel = channel
        self.root: rootfs.Root | None = None
        self.proc_fd = -1
        self.slave = -1
        self.identity: process.Identity | None = None
        self.env: list[bytes] = []
        self.command = ""
        self.warnings: list[str] = []

    @property
    def in_root(self) -> rootfs.Root:
        if self.root is None:
            raise RuntimeFailure("a step needs the root before it was made")
        return self.root

    def warn(self, text: str) -> None:
        """Something was not done quite as asked; the caller hears of it with Ready."""
        self.warnings.append(text)


class Step(Record):
    """A name for errors, the work, and when it is to be done."""

    name: str
    run: Callable[[Init], None]
    when: Callable[[Init], object] | None = None
