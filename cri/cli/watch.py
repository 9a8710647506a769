"""Waiting for a container's end: on its init process where it is on this machine, then on the record.

Refuses to invent an exit code. Invariant: what is returned is what ContainerStatus says after the exit.
"""

from __future__ import annotations

import asyncio
import json
import os

from cri.api import api_pb2 as pb
from cri.cli.connect import Api
from runtime.linux.libc import KernelError
from runtime.linux.process import pidfd_open

# The record follows the exit by the time it takes the shim to tell.
_SHIM_S = 0.005
# Without a process there is none until the shim starts it again, which it leaves a while for.
_DUE_S = 0.2


async def wait_exit(api: Api, container_id: str) -> int:
    """The exit code of the container, once it has one."""
    while True:
        code, pid = await look(api, container_id)
        if code is not None:
            return code
        await wait_pid(pid)


async def look(api: Api, container_id: str) -> tuple[int | None, int]:
    """The exit code, None while there is none, and then the pid of its init to wait for, 0 where it is not known."""
    response = await api.call("ContainerStatus", pb.ContainerStatusRequest(container_id=container_id, verbose=True))
    if response.status.state == pb.CONTAINER_EXITED:
        return int(response.status.exit_code), 0
    return None, int(json.loads(response.info.get("info", "{}")).get("pid", 0))


async def wait_pid(pid: int) -> None:
    """Until the process has ended, and then a moment for the shim to tell. Pid 0: it is about to be started again."""
    if not pid:
        await asyncio.sleep(_DUE_S)
        return
    try:
        fd = pidfd_open(pid)
    except KernelError:
        fd = -1
    if fd >= 0:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
    await asyncio.sleep(_SHIM_S)
