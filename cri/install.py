"""python -m cri.install [--if-stale] PREFIX: writes the command PREFIX/bin/ocid and what makes its start quick.

    PREFIX/bin/ocid             a launcher of a dump (runtime/dump.py), or the same as the next
    PREFIX/lib/ocid/ocid        this interpreter and `cri.cli.main`, as pip would write it
    PREFIX/lib/ocid/dump-HASH   the memory of an interpreter that has imported what most commands need
    PREFIX/lib/ocid/made-of     the files that it was made of (runtime/made_of.py)

With --if-stale nothing is written unless the dump has become stale. Refuses other options. Invariant: each file is
whole or the old one, and one process writes at a time; the command works, at a slower pace, without the last two.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from cri.cli.addresses import COMMANDS as RANDOM
from cri.cli.main import COMMANDS
from runtime import dump, made_of
from runtime.linux.processor import processor

ENTRY = "cri.cli.resumed"
# What commands, and the parts that they have in their process without a daemon, import when they come to it.
_MORE = (
    "cri.api.api_pb2_grpc",
    "cri.daemon",
    "cri.errors",
    "cri.network.collect",
    "google.protobuf.descriptor_pb2",
    "importlib.readers",
    "importlib.resources",
    "tempfile",
    "google.protobuf.json_format",
    "grpc.aio",
    "logging",
    "runtime.errors",
    "runtime.linux.sockets",
    "tomllib",
)
_MAX_SHEBANG = 127
_CODE = "import sys\nfrom cri.cli.main import main\nsys.exit(main())\n"


def main(arguments: list[str]) -> int:
    if_stale = arguments[:1] == ["--if-stale"]
    if len(arguments) != 1 + if_stale:
        print("usage: python -m cri.install [--if-stale] PREFIX", file=sys.stderr)
        return 2
    prefix = Path(arguments[-1]).resolve()
    with dump.locked(prefix, "ocid") as library:
        if not if_stale or made_of.stale(library):
            slow = library / "ocid"
            dump.write(slow, script(sys.executable).encode(), 0o755)
            dump.put(dump.make(slow, modules(), ENTRY, (sys.executable, "-P")), prefix / "bin/ocid", slow, processor())
    return 0


def modules() -> list[str]:
    """What is imported before the stop."""
    return [*(f"cri.cli.{name}" for name in COMMANDS if name not in RANDOM), *_MORE]


def script(interpreter: str) -> str:
    """A file that the kernel starts as `ocid`."""
    if len(interpreter) < _MAX_SHEBANG - 2 and " " not in interpreter:
        return f"#!{interpreter}\n{_CODE}"
    # As pip does: a line that is both shell and Python.
    return f"#!/bin/sh\n'''exec' {shlex.quote(interpreter)} \"$0\" \"$@\"\n' '''\n{_CODE}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
