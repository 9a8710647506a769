"""ExecSync: a command in a running container, to its end, with its output.

Refuses to keep output beyond limits.exec_output_bytes (threats S51): the command goes on, as the CRI wants it, and what
it prints then is dropped. Invariant: nothing is written to disk on this way (threats O62), an answer is one that a
kubelet takes, and a command that outlives its timeout is killed with all it started.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from cri.api import api_pb2 as pb
from cri.errors import DeadlineExceeded, InvalidArgument
from cri.interfaces import ContainerError, ExecSpec
from cri.node import Node
from cri.records import Container
from cri.spec.build import exec_process
from cri.threads import to_thread
from runtime.linux.files import AT_FDCWD, read_bounded

log = logging.getLogger(__name__)

MAX_CONFIG = 16 << 20
MAX_TIMEOUT_S = 10 * 365 * 86400


async def exec_sync(node: Node, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
    """Runs the command. Raises DeadlineExceeded when it was killed for taking too long."""
    container = node.running(node.container(request.container_id), "exec in")
    if request.timeout < 0:
        raise InvalidArgument(f"timeout: {request.timeout} s is less than none")
    process = exec_process({"process": await process_of(node, container)}, request.cmd)
    limit = node.config.limits.exec_output_bytes
    spec = ExecSpec(process, timeout_s=float(min(request.timeout, MAX_TIMEOUT_S)), output_limit=limit)
    # Threads of their own: commands that hang must not keep anybody but other commands waiting (threats O30).
    try:
        result = await node.exec_threads.run(
            node.parts.containers.exec_sync, node.sandbox_of(container), container.id, spec
        )
    except ContainerError:
        # Its end, or its pod's, may have come between: then that is what there is to say.
        node.running(node.container(container.id), "exec in")
        raise
    what = f"exec {request.cmd[0][:80]!r} in {container.name} ({container.id[:13]})"
    if result.timed_out:
        raise DeadlineExceeded(f"{what}: not done within {request.timeout} s, it was killed")
    stdout, stderr = _bounded(result.stdout, result.stderr, limit)
    if result.truncated or len(stdout) + len(stderr) < len(result.stdout) + len(result.stderr):
        log.info("%s: of its output the first %d bytes are kept (limits.exec_output_bytes)", what, limit)
    return pb.ExecSyncResponse(stdout=stdout, stderr=stderr, exit_code=result.exit_code)


def _bounded(stdout: bytes, stderr: bytes, limit: int) -> tuple[bytes, bytes]:
    """The beginnings of both, `limit` bytes together: a client takes a message of 16 MiB at most. However much there is
    on stdout, the errors have an eighth."""
    stderr = stderr[: max(limit - len(stdout), limit // 8)]
    return stdout[: limit - len(stderr)], stderr


async def process_of(node: Node, container: Container) -> dict[str, Any]:
    """The `process` of the container's config.json; kept, since it never changes."""
    process = node.processes.get(container.id)
    if process is None:
        path = node.paths.bundle(container.id) / "config.json"
        raw = await to_thread(read_bounded, AT_FDCWD, str(path), MAX_CONFIG)
        process = json.loads(raw)["process"]
        node.processes[container.id] = process
    return process
