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


async def wait_exit(api: Api, container_id: str) -> int:
    """The exit code of the container, once it has one."""
    while True:
        request = pb.ContainerStatusRequest(container_id=container_id, verbose=True)
        response = await api.call("ContainerStatus", request)
        if response.status.state == pb.CONTAINER_EXITED:
            return int(response.status.exit_code)
        pid = json.loads(response.info.get("info", "{}")).get("pid", 0)
        if pid:
            await _wait_pid(pid)
        # The record follows the exit by the time it takes the shim to tell.
        await asyncio.sleep(0.005)


async def _wait_pid(pid: int) -> None:
    try:
        fd = pidfd_open(pid)
    except KernelError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
