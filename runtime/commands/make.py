"""`ocirun create` and `ocirun run`.

Refuses a detached terminal without a console socket, as runc does: nobody would hold its other end. Invariant: a run
that is attached leaves nothing of the container behind, whatever it ended by.
"""

from __future__ import annotations

import os

from runtime import create, lifecycle, spec
from runtime.errors import RuntimeFailure
from runtime.foreground import Foreground, sized
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.options import Flag, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cli import Context
    from runtime.options import Values

_MAX_CONFIG = 16 << 20
_COMMON = (
    Flag(("bundle", "b"), "str", "the bundle's directory (default: the working directory)"),
    Flag(("console-socket",), "str", "unix socket that is sent the terminal's master"),
    Flag(("pid-file",), "str", "file to write the process's id to"),
    Flag(("no-pivot",), "bool", "chroot instead of pivot_root, for a root on a ramdisk"),
    Flag(("preserve-fds",), "int", "how many descriptors from 3 on the process gets"),
    Flag(("no-new-keyring",), "bool", "not supported: every container gets a session keyring"),
)
FLAGS = {
    "create": _COMMON,
    "run": (
        *_COMMON,
        Flag(("detach", "d"), "bool", "do not wait for the process"),
        Flag(("keep",), "bool", "do not delete the container when it has ended"),
        Flag(("no-subreaper",), "bool", "do not reap processes that lose their parent"),
    ),
}
WORDS = {"create": "CONTAINER", "run": "CONTAINER"}


def run(context: Context, name: str, values: Values) -> int:
    if len(values.words) != 1:
        raise UsageError('"CONTAINER" is required, and nothing after it')
    if values.on("no-new-keyring"):
        raise RuntimeFailure("--no-new-keyring is not supported yet")
    preserve = values.number("preserve-fds")
    if not 0 <= preserve <= 1024:
        raise UsageError(f"--preserve-fds: {preserve} is not from 0 to 1024")
    bundle = os.path.abspath(values.text("bundle", "."))
    config = spec.parse(_read_config(bundle))
    detached = name == "create" or values.on("detach")
    terminal = config.process is not None and config.process.terminal
    if terminal and detached and not values.text("console-socket"):
        raise RuntimeFailure(
            "cannot allocate tty if runc will detach without setting console socket", code="invalid_argument"
        )
    if not terminal and values.text("console-socket"):
        raise RuntimeFailure(
            "cannot use console socket if runc will not detach or allocate tty", code="invalid_argument"
        )
    if config.process is not None and terminal and not values.text("console-socket"):
        config = config.changed(process=sized(config.process))
    request = create.CreateRequest(
        root=context.root,
        id=values.words[0],
        bundle=bundle,
        spec=config,
        console_socket=values.text("console-socket"),
        pid_file=values.text("pid-file"),
        preserve_fds=preserve,
        no_pivot=values.on("no-pivot"),
        systemd_cgroup=context.systemd_cgroup,
    )
    if detached:
        made = create.create(request)
        for text in made.warnings:
            context.warn(text)
        if name == "run":
            _start(context, request.id)
        return 0
    with Foreground(subreaper=not values.on("no-subreaper")) as foreground:
        made = create.create(request)
        try:
            for text in made.warnings:
                context.warn(text)
            lifecycle.start(context.root, request.id)
            return foreground.follow(made.state.pid, made.console)
        finally:
            if not values.on("keep"):
                lifecycle.delete(context.root, request.id, force=True)


def _start(context: Context, container_id: str) -> None:
    try:
        lifecycle.start(context.root, container_id)
    except BaseException:
        lifecycle.delete(context.root, container_id, force=True)
        raise


def _read_config(bundle: str) -> bytes:
    try:
        return read_bounded(AT_FDCWD, f"{bundle}/config.json", _MAX_CONFIG)
    except OSError as error:
        if error.errno == 2:
            raise RuntimeFailure(
                f"JSON specification file config.json not found: {bundle}/config.json: no such file or directory",
                hint="give the bundle's directory with --bundle",
                code="not_found",
            ) from None
        raise RuntimeFailure.of(error, what="read config.json") from None
