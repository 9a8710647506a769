"""`ocid` in a process that goes on from a dump (runtime/dump.py, docs/decisions/0027): what an interpreter makes of its
environment, files and clock when it starts, made once more.

Refuses to go on where an interpreter would have started otherwise: variables that change it or the libraries below it,
a locale that is not UTF-8, another processor than the libraries have chosen their code for. Then the slow command takes
over. Invariant: nobody can tell a resumed command by what it prints, takes and ends with.
"""

from __future__ import annotations

import _thread
import gc
import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from cri.cli.addresses import COMMANDS as RANDOM
from cri.cli.main import COMMANDS, finish, parser_of
from cri.cli.main import main as _ocid
from cri.config_read import learn_types
from runtime.linux import dataclass, dumped
from runtime.linux.processor import processor

# What an interpreter, or a library that is loaded, reads once.
_READ_AT_START = ("PYTHON", "LD_", "GLIBC_TUNABLES", "MALLOC_", "GRPC_", "OPENSSL_", "PROTOCOL_BUFFERS_", "COV")
# Those that are for the following start of something else, and those that are taken up here.
_HONOURED = frozenset(("PYTHON", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"))
_UTF_8 = frozenset(("", "C", "POSIX"))  # in these, too, Python speaks UTF-8 (PEP 540)
_MADE_ON = processor()


def prepare() -> None:
    """Before the stop: what commands would make of their own text, each for itself."""
    for name in COMMANDS:
        if name not in RANDOM:
            parser_of(name)
    dataclass.compile_all()
    learn_types()


def main() -> int:
    """The exit code."""
    if not _suits() or processor() != _MADE_ON:
        dumped.go_slowly()
    dumped.begin_threads()
    gc.enable()
    _thread.stack_size(0)
    time.tzset()
    random.seed()
    sys.orig_argv[:] = sys.argv
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    _streams(unbuffered=bool(os.environ.get("PYTHONUNBUFFERED")))
    return _ended(_ocid)


def _suits() -> bool:
    for name in os.environ:
        if name.startswith(_READ_AT_START) and name not in _HONOURED:
            return False
    locale = next((text for key in ("LC_ALL", "LC_CTYPE", "LANG") if (text := os.environ.get(key))), "")
    return locale in _UTF_8 or locale.partition("@")[0].upper().endswith((".UTF-8", ".UTF8"))


def _streams(*, unbuffered: bool) -> None:
    """As pylifecycle.c makes them."""
    sys.stdin = sys.__stdin__ = _stream(0, "r", unbuffered=unbuffered)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _stream(1, "w", unbuffered=unbuffered)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, "w", unbuffered=unbuffered)  # type: ignore[misc]


def _stream(fd: int, mode: str, *, unbuffered: bool) -> Any:
    """None where there is no such fd."""
    try:
        unbuffered = unbuffered and mode == "w"
        file: Any = open(fd, f"{mode}b", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    except OSError:
        return None
    name = ("<stdin>", "<stdout>", "<stderr>")[fd]
    raw = file if unbuffered else file.raw
    raw.name = name
    text = io.TextIOWrapper(
        file,
        "utf-8",
        "backslashreplace" if fd == 2 else "surrogateescape",
        "\n",
        line_buffering=fd == 2 or raw.isatty(),
        write_through=unbuffered,
    )
    text.mode = mode  # type: ignore[misc]
    return text


def _ended(program: Callable[[], int]) -> int:
    """The exit code of `program`, when all is done that an interpreter does before it takes itself apart."""
    try:
        code = program()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if code == 1 and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = 130
        finish()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    return code & 0xFF if finish() else _unwritten()


def _unwritten() -> int:
    """Says of standard output what an interpreter says; the code that it ends with then."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()  # fails once more: what could not be written is still there
    except (OSError, ValueError) as error:
        if sys.stderr is not None:
            print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
    return 120
