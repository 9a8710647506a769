"""`ocirun checkpoint` and `ocirun restore`.

Refuses a parent of a pre-dump that is not beside it, as runc does. Invariant: a restore that is attached leaves nothing
of the container behind, whatever it ended by.
"""

from __future__ import annotations

import os

from runtime.checkpoint import CGROUP_MODES, EMPTY_NAMESPACES, CheckpointRequest, Images, checkpoint
from runtime.errors import RuntimeFailure
from runtime.options import Flag, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cli import Context
    from runtime.options import Values

_BOTH = (
    Flag(("image-path",), "str", "directory of criu's images (default: ./checkpoint)"),
    Flag(("work-path",), "str", "directory of criu's log and work files (default: that of the images)"),
    Flag(("tcp-established",), "bool", "with open tcp connections"),
    Flag(("ext-unix-sk",), "bool", "with unix sockets whose other end is outside"),
    Flag(("shell-job",), "bool", "with a terminal that is not the container's own"),
    Flag(("lazy-pages",), "bool", "memory is fetched when it is touched (userfaultfd)"),
    Flag(("file-locks",), "bool", "with file locks"),
    Flag(("manage-cgroups-mode",), "str", "soft, full, strict or ignore (default: soft)"),
    Flag(("empty-ns",), "list", "a namespace to leave empty (network), again for more"),
    Flag(("auto-dedup",), "bool", "punch memory out of parent images that newer ones have"),
)
FLAGS = {
    "checkpoint": (
        *_BOTH,
        Flag(("parent-path",), "str", "images of the pre-dump before, relative to --image-path"),
        Flag(("leave-running",), "bool", "the container runs on"),
        Flag(("pre-dump",), "bool", "write memory only; the container runs on"),
        Flag(("tcp-skip-in-flight",), "bool", "without tcp connections that are just being made"),
        Flag(("link-remap",), "bool", "with files that are open and unlinked"),
        Flag(("page-server",), "str", "ADDRESS:PORT that takes the memory"),
        Flag(("status-fd",), "int", "descriptor that is written a byte once lazy pages can be served"),
    ),
    "restore": (
        *_BOTH,
        Flag(("bundle", "b"), "str", "the bundle's directory (default: the working directory)"),
        Flag(("console-socket",), "str", "unix socket that is sent the terminal's master"),
        Flag(("detach", "d"), "bool", "do not wait for the process"),
        Flag(("pid-file",), "str", "file to write the process's id to"),
        Flag(("no-subreaper",), "bool", "do not reap processes that lose their parent"),
        Flag(("no-pivot",), "bool", "accepted for runc's callers: it is criu that enters the root"),
        Flag(("lsm-profile",), "str", "LSM profile for the processes, TYPE:NAME"),
        Flag(("lsm-mount-context",), "str", "LSM label for the mounts"),
    ),
}
WORDS = {"checkpoint": "CONTAINER", "restore": "CONTAINER"}


def run(context: Context, name: str, values: Values) -> int:
    if len(values.words) != 1:
        raise UsageError(f'"{name}" requires exactly 1 argument(s): {WORDS[name]}')
    if os.geteuid() != 0:
        context.warn(f"{name} is untested with rootless containers")
    if name == "restore":
        return _restore(context, values)
    checkpoint(
        CheckpointRequest(
            root=context.root,
            id=values.words[0],
            images=_images(context, values, values.text("parent-path")),
            leave_running=values.on("leave-running"),
            pre_dump=values.on("pre-dump"),
            page_server=_page_server(values.text("page-server")),
            status_fd=values.number("status-fd", -1),
        )
    )
    return 0


def _images(context: Context, values: Values, parent: str) -> Images:
    image_path = os.path.abspath(values.text("image-path", "checkpoint"))
    mode = values.text("manage-cgroups-mode")
    if mode not in CGROUP_MODES:
        raise RuntimeFailure("Invalid manage-cgroups-mode value", code="invalid_argument")
    empty = 0
    for kind in values.all("empty-ns"):
        if kind not in EMPTY_NAMESPACES:
            raise RuntimeFailure(f"namespace {kind:.40} is not supported", code="invalid_argument")
        empty |= EMPTY_NAMESPACES[kind]
    if parent:
        if parent.startswith("/"):
            raise RuntimeFailure("--parent-path must be relative", code="invalid_argument")
        os.makedirs(image_path, 0o700, exist_ok=True)  # so that ".." leads out of it
        if not os.path.isdir(os.path.join(image_path, parent)):
            raise RuntimeFailure(f"invalid --parent-path: {parent} is no directory", code="invalid_argument")
    work = values.text("work-path")
    return Images(
        program=context.criu,
        image_path=image_path,
        work_path=os.path.abspath(work) if work else "",
        parent_path=parent,
        tcp_established=values.on("tcp-established"),
        ext_unix_sk=values.on("ext-unix-sk"),
        shell_job=values.on("shell-job"),
        lazy_pages=values.on("lazy-pages"),
        file_locks=values.on("file-locks"),
        auto_dedup=values.on("auto-dedup"),
        manage_cgroups=CGROUP_MODES[mode],
        empty_ns=empty,
    )


def _page_server(text: str) -> tuple[str, int] | None:
    if not text:
        return None
    address, _, port = text.rpartition(":")
    if not address or not port:
        raise RuntimeFailure("Use --page-server ADDRESS:PORT to specify page server", code="invalid_argument")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise RuntimeFailure(f"Invalid port number: --page-server {text[:80]}", code="invalid_argument")
    return address, int(port)


def _restore(context: Context, values: Values) -> int:
    from runtime import lifecycle, spec
    from runtime.commands.make import read_config
    from runtime.foreground import Foreground, check_terminal
    from runtime.restore import RestoreRequest, restore

    bundle = os.path.abspath(values.text("bundle", "."))
    config = spec.parse(read_config(bundle))
    detached, console_socket = values.on("detach"), values.text("console-socket")
    check_terminal(config.process is not None and config.process.terminal, detached, console_socket)
    request = RestoreRequest(
        root=context.root,
        id=values.words[0],
        bundle=bundle,
        spec=config,
        images=_images(context, values, ""),
        console_socket=console_socket,
        pid_file=values.text("pid-file"),
        systemd_cgroup=context.systemd_cgroup,
        rootless=context.rootless,
        lsm_profile=values.text("lsm-profile"),
        lsm_mount_context=values.text("lsm-mount-context"),
    )
    if detached:
        restore(request)
        return 0
    with Foreground(subreaper=not values.on("no-subreaper")) as foreground:
        made = restore(request)
        try:
            return foreground.follow(made.state.pid, made.console)
        finally:
            lifecycle.delete(context.root, request.id, force=True)
