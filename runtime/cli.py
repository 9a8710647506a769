"""`ocirun`: runc's command line. Finds the command, and prints a failure the way runc's callers read one.

Refuses a command it does not have by name. Invariant: exit code 0 means done, 1 that ocirun failed (255: an exec did,
3: there is no such command), and anything else is the container's; with --log the last line of that file says why, as
text or JSON. Commands that put a process into a container go on in a sealed interpreter before anything else is
imported (runtime/sealed.py).
"""

from __future__ import annotations

import errno
import os
import sys
import time

from runtime.errors import RuntimeFailure
from runtime.options import Flag, UsageError, describe, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.options import Values

VERSION = "0.1.0"
DEFAULT_ROOT = "/run/ocirun"
# For ocid alone, which starts the shim of a pod so where it has no zygote (runtime/shim/launcher.py).
SHIM = "shim-on-fd-3"

GLOBAL = (
    Flag(("root",), "str", f"directory of container state (default: {DEFAULT_ROOT})"),
    Flag(("log",), "str", "append failures to this file"),
    Flag(("log-format",), "str", "text or json (default: text)"),
    Flag(("debug",), "bool", "print the traceback of a failure"),
    Flag(("systemd-cgroup",), "bool", "cgroups are units of systemd's: cgroupsPath is slice:prefix:name"),
    Flag(("criu",), "str", "criu's program (default: criu on PATH)"),
    Flag(("rootless",), "str", "true, false or auto (default): whether cgroups that may not be made are left out"),
    Flag(
        ("shell-codes",),
        "bool",
        "exec: speak and exit as ocid exec: 126 or 127 for what cannot be executed",
    ),
    Flag(("version", "v"), "bool", "print the version"),
    Flag(("help", "h"), "bool", "print this"),
)
# command: (module below runtime.commands, what it does, whether a process of it enters a container)
COMMANDS = {
    "create": ("make", "set a container up; its process waits for start", True),
    "run": ("make", "create, start, and wait unless --detach", True),
    "exec": ("enter", "run a command in a running container", True),
    "start": ("change", "start the process of a created container", False),
    "kill": ("change", "send a signal to a container's process", False),
    "delete": ("change", "remove what a container holds", False),
    "pause": ("change", "freeze a container", False),
    "resume": ("change", "thaw a container", False),
    "state": ("show", "print a container's state as JSON", False),
    "list": ("show", "list containers", False),
    "ps": ("show", "list a container's processes", False),
    "update": ("update", "change a container's limits", False),
    "events": ("events", "print a container's figures as JSON lines", False),
    "spec": ("about", "write a config.json to start from", False),
    "checkpoint": ("checkpoint", "write a running container to disk, through criu", False),
    "restore": ("checkpoint", "make a container out of what checkpoint wrote", False),
    "features": ("features", "print what this runtime can do", False),
}


class Context:
    """What the global flags say."""

    __slots__ = ("command", "criu", "debug", "log", "log_json", "root", "rootless", "shell_codes", "systemd_cgroup")

    def __init__(self, values: Values) -> None:
        self.root = values.text("root", _default_root())
        self.log = values.text("log")
        self.log_json = values.text("log-format", "text") == "json"
        self.debug = values.on("debug")
        self.systemd_cgroup = values.on("systemd-cgroup")
        self.shell_codes = values.on("shell-codes")
        self.criu = values.text("criu", "criu")
        self.command = ""
        self.rootless = _truth("rootless", values.text("rootless", "auto"))

    def warn(self, text: str) -> None:
        """A warning, to the log or to stderr."""
        self.write("warning", text)

    def write(self, level: str, text: str) -> None:
        """A line as logrus writes it, which is what reads these files."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        from runtime.fields import encode

        if self.log_json:
            line = encode({"level": level, "msg": text, "time": moment}) + b"\n"
        else:
            line = b'time="' + moment.encode() + b'" level=' + level.encode() + b" msg=" + encode(text) + b"\n"
        fd = self.open_log() if self.log else 2
        try:
            os.write(fd, line)
        finally:
            if fd != 2:
                os.close(fd)

    def open_log(self) -> int:
        """The file of --log, made if it is not there. Raises OSError."""
        return os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _truth(flag: str, word: str) -> bool | None:
    """What Go's strconv.ParseBool makes of it; None for "auto"."""
    if word in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if word in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    if word in ("", "auto"):
        return None
    raise UsageError(f"--{flag}: expected true, false or auto, got {word[:40]!r}")


def _default_root() -> str:
    if os.geteuid() == 0 and not _is_root_for_a_user():
        return DEFAULT_ROOT
    return f"{os.environ.get('XDG_RUNTIME_DIR', f'/run/user/{os.geteuid()}')}/ocirun"


def _is_root_for_a_user() -> bool:
    """Root of a user namespace whose runtime directory is an ordinary user's, as runc tells it."""
    if "XDG_RUNTIME_DIR" not in os.environ or os.environ.get("USER") == "root":
        return False
    from runtime.rootless import in_user_namespace

    return in_user_namespace()


def usage() -> str:
    """The text of --help."""
    width = max(map(len, COMMANDS))
    commands = "".join(f"  {name:<{width}}  {text}\n" for name, (_, text, _) in COMMANDS.items())
    return (
        "usage: ocirun [FLAGS] COMMAND [FLAGS] CONTAINER …\n\nRuns OCI bundles, with runc's command line.\n\n"
        f"commands:\n{commands}\nflags:\n{describe(GLOBAL)}\n`ocirun COMMAND --help` says more.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `ocirun` command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == [SHIM]:
        return _shim(words)
    try:
        values = parse(words, GLOBAL)
        if values.text("log-format", "text") not in ("text", "json"):
            raise UsageError(f"--log-format: expected text or json, got {values.text('log-format')[:40]!r}")
        context = Context(values)
    except UsageError as error:
        return _misused(str(error))
    if values.on("version"):
        from runtime.state import SPEC_VERSION

        os.write(1, f"ocirun version {VERSION}\nspec: {SPEC_VERSION}\n".encode())
        return 0
    if values.on("help") or not values.words:
        os.write(1, usage().encode())
        return 0
    if context.log:
        try:
            os.close(context.open_log())
        except OSError as error:
            return _misused(f"open {context.log}: {os.strerror(error.errno or 0).lower()}")
    name = context.command = values.words[0]
    if name not in COMMANDS:
        return _misused(f"No help topic for '{name}'", 3, context)
    return _run(context, words, name, values.words[1:])


def _shim(words: list[str]) -> int:
    from runtime import sealed

    sealed.secure("runtime.cli", words)
    from runtime.shim.zygote import main as shim

    return shim(["direct"])


def _run(context: Context, words: list[str], name: str, rest: list[str]) -> int:
    module, text, enters = COMMANDS[name]
    try:
        if enters:
            from runtime import sealed

            sealed.secure("runtime.cli", words)
            from runtime.linux.process import set_comm

            set_comm("ocirun")  # it is the interpreter's or the loader's until now
        commands = __import__(f"runtime.commands.{module}", fromlist=["FLAGS"])
        flags = (*commands.FLAGS[name], Flag(("help", "h"), "bool", "print this"))
        # In exec and ps what follows the container is the command's, and the options of ps.
        values = parse(rest, flags, mixed=name not in ("exec", "ps"))
        if values.on("help"):
            os.write(1, f"usage: ocirun {name} [FLAGS] {commands.WORDS[name]}\n\n{text}\n\n{describe(flags)}".encode())
            return 0
        return int(commands.run(context, name, values))
    except UsageError as error:
        return _misused(f"{name}: {error}", context=context)
    except (RuntimeFailure, OSError) as error:
        if context.debug:
            import traceback

            traceback.print_exc()
        return _failed(context, RuntimeFailure.of(error))
    except KeyboardInterrupt:
        return 130


def _misused(text: str, code: int = 1, context: Context | None = None) -> int:
    if context is not None and (context.log or context.log_json):
        context.write("error", text)
        if not context.log:
            return code
    os.write(2, f"ocirun: {text}\nsee ocirun --help\n".encode("utf-8", "surrogateescape"))
    return code


def _failed(context: Context, failure: RuntimeFailure) -> int:
    message = failure.message
    if failure.step in ("command", "exec", "cwd"):
        message = f"unable to start container process: {message}"
    elif failure.step:
        message = f"{message} (step: {failure.step})"
    notes = "; ".join(getattr(failure, "__notes__", ()))
    message += f"; {notes}" if notes else ""
    said = {"exec": "exec failed: ", "create": "ocirun create failed: ", "run": "ocirun run failed: "}
    if context.log or context.log_json:
        context.write("error", said.get(context.command, "") + message)
    hint = f"\n  hint: {failure.hint}" if failure.hint else ""
    if context.shell_codes:  # for `ocid exec`, in whose place this process is
        os.write(2, f"ocid exec: {failure.message}{hint}\n".encode("utf-8", "surrogateescape"))
        if failure.step in ("command", "exec"):
            return 127 if failure.errno == errno.ENOENT else 126
        return 125
    if context.log or not context.log_json:  # who asks for json, and for no file, reads it on stderr
        began = f"ocirun {context.command}{' failed' if context.command in said else ''}"
        os.write(2, f"{began}: {message}{hint}\n".encode("utf-8", "surrogateescape"))
    return 255 if context.command == "exec" else 1  # what an exec itself exits with is the command's


if __name__ == "__main__":
    sys.exit(main())
