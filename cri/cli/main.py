"""`ocid`: finds the subcommand, reads the options that all of them share, and turns failures into one sentence.

Refuses unknown commands by name. Invariant: exit code 0 means it was done; a container's own exit code is passed on;
125 means ocid itself failed, 126 and 127 that the command could not be run or found (as docker and podman do).
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from cri.cli import addresses

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn, TextIO

FAILED = 125
# More objects than a start makes that stay: at the default of 700 the collector looks through them hundreds of times,
# which is a fifth of the time until a command is ready, and at 50,000 twice, a tenth. What lives long lowers it again.
OBJECTS_OF_A_START = 200_000
COMMANDS = {
    "serve": "serve the CRI for a kubelet or crictl",
    "run": "run a command in a new container",
    "pod": "play the pods of a Kubernetes file, list them, and take them down",
    "ps": "list containers",
    "logs": "print what a container wrote",
    "exec": "run a command in a running container",
    "stop": "stop containers: their stop signal, then SIGKILL",
    "kill": "send a signal to a container",
    "wait": "wait until containers have exited and print their exit codes",
    "rm": "remove containers",
    "inspect": "print all that is known of a container or an image, as JSON; with docker://… without pulling it",
    "stats": "print what containers use",
    "pull": "fetch an image",
    "images": "list images",
    "rmi": "remove images",
    "tag": "give an image a further name",
    "load": "load images from an archive",
    "save": "save images to an archive",
    "push": "send an image that is here to a registry",
    "copy": "copy an image between registries, layouts, archives, directories and the store",
    "sync": "copy all images of a repository, a directory or a list to a registry or a directory",
    "verify": "say whether the signature policy accepts an image, and why; --deep: whether it was tampered with here",
    "sign": "sign an image in a registry, with a key or an identity",
    "manifest": "print an image's manifest, config, tags or what refers to it, without pulling; or delete it there",
    "gc": "remove what no image, container or pull needs",
    "doctor": "verify everything in the store, and repair it",
    "events": "print what happens, as it happens",
    "config": "print the configuration",
    "info": "print the state of the node runtime",
    "version": "print the versions",
}


_parsers: dict[str, Parser] = {}


class Parser(argparse.ArgumentParser):
    """Words that are no options of ours are a failure of ours: argparse's 2 could be the container's own code."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: {message}; see {self.prog} --help\n")


class CommandError(Exception):
    """What went wrong, for the person at the terminal; `code` is the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "usage: ocid [--config FILE] [--root DIR] [--state DIR] COMMAND …\n\n"
        "A node runtime: images verified, layers shared, pods supervised.\n\ncommands:\n" + "\n".join(lines) + "\n\n"
        "options:\n"
        "  --config FILE  configuration (default: /etc/ocid/config.toml, if it is there)\n"
        "  --root DIR     images, snapshots and records (default: /var/lib/ocid)\n"
        "  --state DIR    sockets, pins and bundles (default: /run/ocid)\n"
        "  --debug        print the whole traceback of a failure\n\n"
        "`ocid COMMAND --help` says more. Where a daemon serves --state, commands go through it.\n"
    )


def parser_of(command: str) -> Parser:
    """What reads the words after the command; made once, of nothing that differs from process to process."""
    if command not in _parsers:
        _parsers[command] = _parser(command)
        importlib.import_module(f"cri.cli.{command}").arguments(_parsers[command])
    return _parsers[command]


def _parser(command: str) -> Parser:
    parser = Parser(prog=f"ocid {command}", description=COMMANDS[command], allow_abbrev=False, add_help=False)
    asked = ("--help",) if command == "run" else ("-h", "--help")  # -h of a run is its host name, as with docker
    parser.add_argument(*asked, action="help", help="show this help message and exit")
    _shared(parser)
    return parser


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    parser.add_argument("--root", metavar="DIR", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    parser.add_argument("--state", metavar="DIR", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS, default=argparse.SUPPRESS)


def main() -> int:
    """Entry point of the `ocid` command."""
    gc.set_threshold(OBJECTS_OF_A_START)
    try:
        code = ocid(sys.argv[1:])
    finally:
        gc.freeze()  # or the interpreter looks through all of them as it ends: 30 ms, and nobody waits for a finalizer
    if finish():
        os._exit(code & 0xFF)
    return code  # and the interpreter says what could not be written


def finish() -> bool:
    """What an interpreter does at its end before it takes every module apart, which is 60 ms of a processor where all
    parts have been imported, and a third of what a short command costs. False where what was printed cannot be
    written. Once more is as good as once."""
    if "threading" in sys.modules:
        import threading

        threading._shutdown()  # type: ignore[attr-defined]  # waits for those that are no daemons
    atexit._run_exitfuncs()
    flushed = [_flushed(stream) for stream in (sys.stdout, sys.stderr)]
    return all(flushed)


def _flushed(stream: TextIO | None) -> bool:
    try:
        if stream is not None and not stream.closed:
            stream.flush()
    except (OSError, ValueError):
        return False
    return True


def ocid(words: Sequence[str]) -> int:
    """Does what the words ask for; the exit code."""
    before = Parser(prog="ocid", add_help=False, allow_abbrev=False)
    _shared(before)
    before.add_argument("-h", "--help", action="store_true")
    split = next((i for i, word in enumerate(words) if word in COMMANDS and not _is_value(words, i)), len(words))
    shared, unknown = before.parse_known_args(words[:split])
    if shared.help or not words:
        print(_usage(), end="")
        return 0
    if split == len(words) or unknown:
        wrong = next((word for word in unknown if not word.startswith("-")), unknown[0] if unknown else "")
        print(f"ocid: {wrong!r} is no command; see ocid --help" if wrong else _usage(), file=sys.stderr)
        return FAILED
    command = words[split]
    if command in addresses.COMMANDS:
        addresses.random()
    module = importlib.import_module(f"cri.cli.{command}")
    parser = parser_of(command)
    merged = argparse.Namespace(
        **{
            "subcommand": command,
            "config": None,
            "root": None,
            "state": None,
            "debug": False,
            **{k: v for k, v in vars(shared).items() if k != "help"},
        }
    )
    args = parser.parse_args(words[split + 1 :], merged)
    try:
        return int(module.run(args))
    except CommandError as error:
        print(f"ocid {command}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        if args.debug:
            raise
        from runtime.errors import RuntimeFailure

        print(f"ocid {command}: {RuntimeFailure.of(error)}", file=sys.stderr)
        return FAILED


def _is_value(words: Sequence[str], index: int) -> bool:
    return index > 0 and words[index - 1] in ("--config", "--root", "--state")


if __name__ == "__main__":
    sys.exit(main())
