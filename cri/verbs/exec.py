"""Exec: a one-time URL for a command in a running container; it starts when a client comes for it.

Refuses what a terminal cannot do (a stderr of its own) and a command nobody would hear of. Invariant: nothing runs
before the URL is used; a URL that is never used leaves nothing behind.
"""

from __future__ import annotations

from cri.api import api_pb2 as pb
from cri.errors import InvalidArgument
from cri.node import Node
from cri.spec.build import exec_process
from cri.streaming.sessions import Exec
from cri.verbs.exec_sync import process_of


async def exec_stream(node: Node, request: pb.ExecRequest) -> pb.ExecResponse:
    """The URL."""
    check_streams(request)
    container = node.running(node.container(request.container_id), "exec in")
    process = exec_process({"process": await process_of(node, container)}, request.cmd, terminal=request.tty)
    if request.tty:
        process["env"] = [*process.get("env", ()), *_terminal_name(process)]
    wanted = Exec(
        node.sandbox_of(container),
        container.id,
        process,
        stdin=request.stdin,
        stdout=request.stdout,
        stderr=request.stderr,
        terminal=request.tty,
    )
    return pb.ExecResponse(url=node.streaming().offer(wanted))


def check_streams(request: pb.ExecRequest | pb.AttachRequest) -> None:
    """Raises InvalidArgument for streams that no session can have."""
    if request.tty and request.stderr:
        raise InvalidArgument("stderr: a terminal has one output, so tty and stderr exclude one another")
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidArgument("stdin, stdout, stderr: at least one has to be asked for")


def _terminal_name(process: dict[str, object]) -> list[str]:
    """TERM for a command with a terminal in a container that was made without one."""
    variables = process.get("env", ())
    assert isinstance(variables, list | tuple)
    return [] if any(entry.startswith("TERM=") for entry in variables) else ["TERM=xterm"]
