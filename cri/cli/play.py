"""`ocid pod play`: pods out of a file, as cri.podfile has understood it, with the calls that a kubelet uses.

Refuses a name that is taken. Init containers run one after the other; the first that fails is the end of its pod,
whatever its restartPolicy, since somebody waits at a terminal. Invariant: a pod whose containers have not all been
started is taken away again, with its volumes, and the error says why.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from cri.api import api_pb2 as pb
from cri.cli.connect import Api, configuration
from cri.cli.main import CommandError
from cri.cli.pull import Wanted, present
from cri.cli.rm import remove_pod
from cri.cli.watch import wait_exit
from cri.marks import LOGS, VOLUMES
from cri.podfile.containers import Planned
from cri.podfile.pod import PlannedPod, pods
from cri.podfile.volumes import Volume
from runtime.linux.failpoint import failpoint
from runtime.linux.files import write_all

_LAST = 2000  # bytes of a log that an error shows


def plan(args: argparse.Namespace, raw: bytes) -> list[PlannedPod]:
    """The pods in a file. Raises RuntimeFailure (FieldError)."""
    root = configuration(args).root
    return pods(raw, args.file, lambda uid: (root / LOGS / uid, root / VOLUMES / uid))


async def play(api: Api, pod: PlannedPod) -> str:
    """Makes and starts the pod; its id. Raises CommandError, and then nothing of it is left."""
    from cri.cli.pod import found

    if await found(api, pod.name):
        raise CommandError(f"the name {pod.name} is taken; ocid pod rm {pod.name} frees it, or say --replace")
    images = {one.name: await _image(api, one) for one in (*pod.init, *pod.containers)}
    root, uid = str(api.config.root), pod.config.metadata.uid
    async with api.launching(uid), contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(remove_pod, api, "", root, uid)
        os.makedirs(pod.config.log_directory, 0o700)
        _make_volumes(pod)
        made = await api.call("RunPodSandbox", pb.RunPodSandboxRequest(config=pod.config))
        id_ = str(made.pod_sandbox_id)
        undo.push_async_callback(remove_pod, api, id_, root, uid)
        for one in pod.init:
            await _run_to_end(api, pod, id_, one, images[one.name])
        failpoint("ocid_play.init")
        for one in pod.containers:
            await _start(api, pod, id_, one, images[one.name])
        undo.pop_all()
    return id_


async def _image(api: Api, one: Planned) -> str:
    """The image's id, fetched as the pull policy says."""
    return await present(api, one.image, one.pull, Wanted(), f"container {one.name}: ", "imagePullPolicy Never")


async def _start(api: Api, pod: PlannedPod, pod_id: str, one: Planned, image: str) -> str:
    one.config.image.image, one.config.image.user_specified_image = image, one.image
    request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=one.config, sandbox_config=pod.config)
    container = str((await api.call("CreateContainer", request)).container_id)
    await api.call("StartContainer", pb.StartContainerRequest(container_id=container))
    return container


async def _run_to_end(api: Api, pod: PlannedPod, pod_id: str, one: Planned, image: str) -> None:
    code = await wait_exit(api, await _start(api, pod, pod_id, one, image))
    if code:
        log = Path(pod.config.log_directory, one.config.log_path)
        said = log.read_bytes()[-_LAST:].splitlines() if log.is_file() else []
        last = said[-1].split(b" ", 3)[-1].decode(errors="replace") if said else "it said nothing"
        raise CommandError(f"pod {pod.name}: init container {one.name} ended with {code}: {last}")


def _make_volumes(pod: PlannedPod) -> None:
    """Below a directory that only root passes: an emptyDir is everybody's inside of the pod alone."""
    os.makedirs(pod.directory, 0o700)
    for volume in pod.volumes:
        if volume.host_path:
            _check_host(volume)
            continue
        top = pod.directory / volume.name
        top.mkdir(mode=0o755)
        os.chmod(top, 0o777 if volume.writable else 0o755)  # noqa: S103 - Kubernetes' emptyDir is everybody's
        for path, mode, content in volume.files:
            target = top / path
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                write_all(fd, content)
                os.fchmod(fd, mode)
            finally:
                os.close(fd)


def _check_host(volume: Volume) -> None:
    """What hostPath.type promises. Raises CommandError."""
    path = Path(volume.host_path)
    if volume.host_type == "DirectoryOrCreate":
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        return
    checks = {"": os.path.lexists, "Directory": os.path.isdir, "File": os.path.isfile, "Socket": Path.is_socket}
    if not checks[volume.host_type](path):
        kind = f" as a {volume.host_type}" if volume.host_type else ""
        raise CommandError(f"volume {volume.name}: {path} is not there{kind}")
