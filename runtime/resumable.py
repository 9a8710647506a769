"""The process that a dump is made of (runtime/dump.py): it imports, settles, stops, and is the command once resumed.

Refuses to go on from files that have changed since: the interpreter, its libraries, the modules. Then the slow command
takes over, in the same process. Invariant: nothing that differs from process to process was looked at before the stop.
"""

from __future__ import annotations

import _thread
import gc
import os
import struct
import sys
import time

from runtime.fields import encode
from runtime.linux import dumped, failpoint
from runtime.linux.memory import malloc_trim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_STACK_BYTES = 8 << 20  # as RLIMIT_STACK is elsewhere


def main(arguments: list[str]) -> NoReturn:
    """Of the process that the dumped one is forked from. Arguments: the fd to report to, the slow command, the
    module whose `main` is the command, and whose `prepare`, if it has one, is called before the stop, and further ones
    to import."""
    report, slow, entry, *modules = arguments
    began = time.time_ns()
    for name in (entry, *modules):
        __import__(name)
    prepare = getattr(sys.modules[entry], "prepare", None)
    if prepare is not None:
        prepare()
    lock = _thread.allocate_lock()
    lock.acquire()
    _thread.stack_size(_STACK_BYTES)
    _thread.start_new_thread(_fork, (int(report), slow, entry, began))
    lock.acquire()  # for ever
    raise AssertionError


def _fork(report: int, slow: str, entry: str, began: int) -> None:
    """In the second thread: the parent tells when the forked process has stopped, and ends with it."""
    try:
        pid = os.fork()
        if pid == 0:
            _stop(report, slow, entry, began)
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            os.write(report, b"stopped\n")
            os.waitpid(pid, 0)
    finally:
        os._exit(0)


def _stop(report: int, slow: str, entry: str, began: int) -> NoReturn:
    code = 1
    try:
        known = dumped.prepare(slow)
        sources = _sources()
        if known is not None and all(mtime < began for _, mtime, _ in sources):
            told = {**known, "pid": os.getpid(), "files": sources}
            with open(report, "wb") as parent:
                parent.write(b"%s\n" % encode(told))
            facts = struct.pack(f"={2 * len(sources)}q", *(fact for _, *facts in sources for fact in facts))
            paths = "\0".join(path for path, _, _ in sources)
            del sources, told
            gc.collect()
            malloc_trim()
            gc.freeze()
            gc.disable()  # until the command says otherwise: most are over in milliseconds
            dumped.stop()
            if not _is_current(paths, facts):
                dumped.go_slowly()
            failpoint.rearm()
            code = sys.modules[entry].main()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _sources() -> list[tuple[str, int, int]]:
    """Path, time and size of the files that this process was made of."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        lines = [line.rstrip("\n").split(maxsplit=5) for line in maps]
    paths = {words[5] for words in lines if len(words) == 6 and "x" in words[1] and words[5][0] == "/"}
    paths |= {path for module in list(sys.modules.values()) if (path := getattr(module, "__file__", None))}
    status = [(path, os.stat(path)) for path in sorted(paths)]
    return [(path, one.st_mtime_ns, one.st_size) for path, one in status]


def _is_current(paths: str, facts: bytes) -> bool:
    """The facts are time and size for each path. As one text and one block, since a resumed process pays for pages."""
    try:
        for path, (mtime, size) in zip(paths.split("\0"), struct.iter_unpack("=2q", facts), strict=True):
            status = os.stat(path)
            if status.st_mtime_ns != mtime or status.st_size != size:
                return False
    except OSError:
        return False
    return True
