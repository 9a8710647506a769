"""ExecSync: a command in a running container, to its end, with its output.

Refuses output beyond limits.exec_output_bytes, by naming that limit (threats S51). Invariant: nothing is written to
disk on this way (threats O62), and a command that outlives its timeout is killed with all it started.
"""

from __future__ import annotations

import json
from typing import Any

from cri.api import api_pb2 as pb
from cri.errors import DeadlineExceeded, InvalidArgument, LimitExceeded
from cri.interfaces import ContainerError, ExecSpec
from cri.node import Node
from cri.records import Container
from cri.spec.build import exec_process
from cri.threads import to_thread
from runtime.linux.files import AT_FDCWD, read_bounded

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
    too_much = ""
    if result.truncated or len(result.stdout) + len(result.stderr) > limit:
        too_much = f"it printed more than {limit} bytes (limits.exec_output_bytes)"
    if result.timed_out:
        also = f"; {too_much}" if too_much else ""
        raise DeadlineExceeded(f"{what}: not done within {request.timeout} s, it was killed{also}")
    if too_much:
        raise LimitExceeded(f"{what}: {too_much}")
    return pb.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)


async def process_of(node: Node, container: Container) -> dict[str, Any]:
    """The `process` of the container's config.json; kept, since it never changes."""
    process = node.processes.get(container.id)
    if process is None:
        path = node.paths.bundle(container.id) / "config.json"
        raw = await to_thread(read_bounded, AT_FDCWD, str(path), MAX_CONFIG)
        process = json.loads(raw)["process"]
        node.processes[container.id] = process
    return process
