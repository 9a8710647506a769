"""An init that is set up in its caller's memory (runtime.linux.clone_vm), where that will do.

    caller                                init
      |-- clone3(CLONE_VM) ---------------->|
      |   waits                             |   every step of runtime.init, in the interpreter of both
      |<- Console, Ready or Failed -------- |   lie in the channel when the caller goes on
      | writes state.json                   |
      |-- Go ------------------------------>|   waits in machine code, for Start as runtime/sync.py draws it
      |                                     |   the filter, the last capabilities, execve; or Refused

A fork costs both their copies of pages: half of what creating a container took. Refuses inits whose caller has work in
their middle (mappings, hooks, an agent of seccomp, a unit of systemd's), or that need more than system calls once they
are started (hooks, a process that stays behind), and, since the kernel ends with a process those that share its memory
when a cgroup has none left, containers with little of it: `may_share`. Invariant: the caller's interpreter is
afterwards what it was before.
"""

from __future__ import annotations

import os
import sys

from runtime import init, process, rootless
from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.init_state import Init
from runtime.linux import clone_vm, signals
from runtime.linux.process import CLONE_NEWCGROUP, CLONE_NEWTIME, CLONE_PARENT
from runtime.namespaces import new_flags
from runtime.sync import Closed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cgroups.manager import Gate, Manager
    from runtime.init_state import Setup
    from runtime.namespaces import Joins
    from runtime.spec import Spec
    from runtime.sync import Channel

_LEAST_MEMORY = 32 << 20  # bytes: what an execve takes fits in many times over
_BESIDE = 16 << 10  # bytes in a block for paths, pointers and messages


def may_share(spec: Spec, joins: Joins, manager: Manager, gate: Gate) -> bool:
    """Whether this init can be set up in the memory of its caller."""
    hooks, memory = spec.hooks, spec.resources.memory.limit
    return not (
        not clone_vm.AVAILABLE
        or spec.has("user")
        or joins.before
        or new_flags(spec.namespaces) & CLONE_NEWTIME
        or gate.late is not None
        or manager.adopts
        or hooks.prestart
        or hooks.create_runtime
        or hooks.create_container
        or hooks.start_container
        or (spec.seccomp is not None and spec.seccomp.listener_path)
        or spec.net_devices
        or spec.intel_rdt is not None
        or (memory is not None and 0 <= memory < _LEAST_MEMORY)
        or rootless.must_be_dumpable(spec)
        or rootless.in_user_namespace()
    )


def clone_init(
    setup: Setup, gate: Gate, mine: Channel, its: Channel, program: bytes, last_words: tuple[int, bytes]
) -> tuple[int, int]:
    """(pid, pidfd) of an init, a child of the caller's parent, that has come to Ready, or has failed and said so: that
    is to be heard on `mine`. `program` is its seccomp filter; of `last_words` see runtime.linux.clone_vm.
    Raises RuntimeFailure."""
    flags = new_flags(setup.spec.namespaces) & ~CLONE_NEWCGROUP | CLONE_PARENT
    words = setup.process
    size = 2 * sum(len(word) + 16 for word in (*words.args, *words.env)) + len(program) + _BESIDE
    block = clone_vm.Block(4 * size)  # a character may be four bytes; what is not used takes no memory
    path, finders = list(sys.path), list(sys.meta_path)
    try:
        return clone_vm.clone(
            flags,
            block,
            lambda: _work(setup, mine, its, program, block),
            cgroup_fd=gate.cgroup_fd,
            last_words=last_words,
        )
    except OSError as error:
        raise RuntimeFailure.of(error, step="clone", what="make the namespaces") from None
    finally:
        sys.path[:] = path
        sys.meta_path[:] = finders


def end_by_signals() -> None:
    """As runtime.process.end_by_signals, without a word to the interpreter."""
    clone_vm.end_by_signals(*process.ENDING)


def _work(setup: Setup, mine: Channel, its: Channel, program: bytes, block: clone_vm.Block) -> bool:
    """In the init. True when it is to wait; else it has told why not."""
    try:
        os.close(mine.fileno())  # the caller's end, but not the caller's object
        one = Init(setup, its)
        init.set_up(one)
        clone_vm.unignore(*signals.ignored(), *signals.KEPT_BY_LIBC)
        signals.set_mask(set())
        _plan(one, program, block)
        its.send("Ready", text=tuple(one.warnings))
        return True
    except Closed:
        return False
    except BaseException as error:
        its.fail(RuntimeFailure.of(error, step="wait"))
        return False


def _plan(one: Init, program: bytes, block: clone_vm.Block) -> None:
    """What runtime.init.start does, as system calls."""
    if one.spec.seccomp is not None:
        block.load_filter("seccomp", program, one.spec.seccomp.flags)
    final = None if one.identity is None else one.identity.final
    if final is not None:
        block.capset("start", *final)
    args = [os.fsencode(word) for word in one.process.args]
    block.execute("exec", os.fsencode(one.command), args, one.env)

    def refused(names: list[str]) -> tuple[bytes, int, int]:
        message = encode({"kind": "Refused", "pid": 0, "text": ["000", "0", *names, one.command]})
        digits = message.index(b'"000"') + 1
        return message, digits, digits + len('000","')

    accepted = encode({"kind": "Accepted", "pid": 0, "text": []})
    block.wait_for_start(one.channel.fileno(), one.setup.listener.fileno(), accepted, refused)
