"""The daemon's values as what is said to a shim: paths as text, tuples as lists, nothing left to a default.

No I/O. Invariant: every field of a message comes from the value; none is made up here.
"""

from __future__ import annotations

from pathlib import Path

from runtime.shim.model import ContainerSpec, SandboxSpec
from runtime.shim.protocol import ContainerMessage, PodMessage


def pod_message(spec: SandboxSpec, state: Path) -> PodMessage:
    """The pod, with the daemon's state directory."""
    return PodMessage(
        id=spec.id,
        directory=str(spec.directory),
        state=str(state),
        hostname=spec.hostname,
        netns="" if spec.netns is None else str(spec.netns),
        new_netns=spec.new_netns,
        private_ipc=spec.private_ipc,
        private_uts=spec.private_uts,
        shared_pid=spec.shared_pid,
        shm_bytes=spec.shm_bytes,
        sysctls=dict(spec.sysctls),
        cgroup_parent=spec.cgroup_parent,
        uids=[list(line) for line in spec.uids],
        gids=[list(line) for line in spec.gids],
    )


def container_message(spec: ContainerSpec) -> ContainerMessage:
    return ContainerMessage(
        id=spec.id,
        bundle=str(spec.bundle),
        fstype=spec.rootfs.fstype,
        source=spec.rootfs.source,
        options=[list(option) for option in spec.rootfs.options],
        attributes=spec.rootfs.attributes,
        log_path="" if spec.log_path is None else str(spec.log_path),
        terminal=spec.terminal,
        stdin=spec.stdin,
        stdin_once=spec.stdin_once,
        handler=spec.handler,
    )
