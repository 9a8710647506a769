"""`ocirun create` and `ocirun run`.

Refuses a detached terminal without a console socket, as runc does: nobody would hold its other end. Invariant: a run
that is attached leaves nothing of the container behind, whatever it ended by, unless --keep asks for it.
"""

from __future__ import annotations

import os

from runtime import create, lifecycle, spec, state
from runtime.errors import RuntimeFailure
from runtime.foreground import Foreground, check_terminal, sized
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.options import Flag, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.birth import Created
    from runtime.cli import Context
    from runtime.notify import Notify
    from runtime.options import Values

_MAX_CONFIG = 16 << 20
_COMMON = (
    Flag(("bundle", "b"), "str", "the bundle's directory (default: the working directory)"),
    Flag(("console-socket",), "str", "unix socket that is sent the terminal's master"),
    Flag(("pidfd-socket",), "str", "unix socket that is sent a pidfd of the process"),
    Flag(("pid-file",), "str", "file to write the process's id to"),
    Flag(("no-pivot",), "bool", "move the root instead of pivot_root, for a root on a ramdisk"),
    Flag(("no-new-keyring",), "bool", "leave the container the session keyring of the caller"),
    Flag(("preserve-fds",), "int", "how many descriptors the process gets, after stdio and those of LISTEN_FDS"),
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
        raise UsageError(f'"{name}" requires exactly 1 argument(s): {WORDS[name]}')
    detached = name == "create" or values.on("detach")
    request = _request(context, values, detached).changed(hold=name == "run")
    if not detached:
        return _attached(context, request, values)
    made = create.create(request)
    _warn(context, made)
    if name == "run":
        _start(context, request, made, keep=values.on("keep"))
    return 0


def _request(context: Context, values: Values, detached: bool) -> create.CreateRequest:
    listening = 0
    if os.environ.get("LISTEN_FDS") or values.given("preserve-fds"):
        # First of all: whatever is opened from here on has a higher number.
        from runtime import inherited

        listening = inherited.listening(os.environ)
        handed_on = inherited.descriptors(values.number("preserve-fds"), listening)
    else:
        handed_on = 0
    bundle = os.path.abspath(values.text("bundle", "."))
    config = spec.parse(read_config(bundle))
    console_socket = values.text("console-socket")
    terminal = config.process is not None and config.process.terminal
    check_terminal(terminal, detached, console_socket)
    if config.process is not None:
        process = config.process
        if terminal and not console_socket:
            process = sized(process)
        if listening:
            process = inherited.with_listening(process, listening, os.environ)
        config = config.changed(process=process)
    notify = bool(os.environ.get("NOTIFY_SOCKET"))
    if notify:
        from runtime.notify import into

        config = into(config, os.path.abspath(state.directory(context.root, values.words[0])))
    return create.CreateRequest(
        root=context.root,
        id=values.words[0],
        bundle=bundle,
        spec=config,
        console_socket=console_socket,
        pidfd_socket=values.text("pidfd-socket"),
        pid_file=values.text("pid-file"),
        preserve_fds=handed_on,
        no_pivot=values.on("no-pivot"),
        systemd_cgroup=context.systemd_cgroup,
        no_new_keyring=values.on("no-new-keyring"),
        notify=notify,
        rootless=context.rootless,
    )


def _warn(context: Context, made: Created) -> None:
    for text in made.warnings:
        context.warn(text)


def _notify(context: Context, request: create.CreateRequest) -> Notify | None:
    if not request.notify:
        return None
    from runtime.notify import Notify

    return Notify(state.directory(request.root, request.id), os.environ["NOTIFY_SOCKET"], context.warn)


def _attached(context: Context, request: create.CreateRequest, values: Values) -> int:
    with Foreground(subreaper=not values.on("no-subreaper")) as foreground:
        made = create.create(request)
        notify = None
        try:
            _warn(context, made)
            notify = _notify(context, request)
            made.start(context.root)
            lifecycle.run_poststart(made.state)
            return foreground.follow(made.state.pid, made.console, notify)
        finally:
            if notify is not None:
                notify.close()
            if not values.on("keep"):
                lifecycle.delete(context.root, request.id, force=True, warn=context.warn)


def _start(context: Context, request: create.CreateRequest, made: Created, *, keep: bool) -> None:
    notify = None
    try:
        notify = _notify(context, request)
        made.start(context.root)
        lifecycle.run_poststart(made.state)
        if notify is not None:
            notify.wait(made.pidfd, made.state.pid)
    except BaseException:
        if not keep:
            lifecycle.delete(context.root, request.id, force=True, warn=context.warn)
        raise
    finally:
        if notify is not None:
            notify.close()


def read_config(bundle: str) -> bytes:
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
