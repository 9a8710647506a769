"""New dumps for ocirun and ocid where the old ones are stale: after an upgrade of Python, of a library, or of ocid.

Until then the command starts the slow way (docs/decisions/0024, 0027). Refuses prefixes that may not be written to, and
says so. Invariant: it is another process that makes the dump, with a low priority and for at most _DEADLINE_S; a
failure leaves the command as it is, which works.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import runtime
from cri.threads import to_thread
from runtime import made_of
from runtime.linux.process import pidfd_open

log = logging.getLogger(__name__)

# The module that installs each command.
INSTALLERS = {"ocirun": "runtime.install", "ocid": "cri.install"}
_DEADLINE_S = 120.0
_NICE = 10
_SAID = 2000  # bytes of what a failed installation says


def library(name: str) -> Path:
    """Where what belongs to that command of this installation has been put."""
    return Path(sys.prefix, "lib", name)


def stale() -> dict[str, str]:
    """Why a command's dump is not used any more, by the command's name."""
    return {name: why for name in INSTALLERS if (why := made_of.stale(library(name)))}


async def renew_if_stale() -> None:
    """For a daemon that has started: what goes wrong is logged, and nothing else."""
    for name, why in (await to_thread(stale)).items():
        log.info("%s starts slowly: %s; it is installed anew", name, why)
        if problem := await renew(name):
            log.warning("%s still starts slowly: %s", name, problem)


async def renew(name: str) -> str:
    """Installs that command anew. What went wrong, or ""."""
    where, installer = library(name), INSTALLERS[name]
    if not os.access(where, os.W_OK):
        return f"{where} cannot be written to: python -m {installer} {sys.prefix}, by who may, would do it"
    said = os.memfd_create(f"{name}-install", os.MFD_CLOEXEC)
    try:
        code = await _run(installer, said)
        if code is None:
            return f"its installation took longer than {_DEADLINE_S:.0f} s"
        words = os.pread(said, _SAID, max(0, os.fstat(said).st_size - _SAID)).decode(errors="replace").strip()
        return f"its installation ended with {code}: {words}" if code else made_of.stale(where)
    finally:
        os.close(said)


async def _run(installer: str, output: int) -> int | None:
    """The exit code of the installation; None where it did not end in time. It is gone afterwards in any case."""
    # -P: the directory that the daemon was started in has no say in what a root process imports. Without ranges as in
    # hack/setup, so that what was compiled then is kept.
    words = [sys.executable, "-P", "-X", "no_debug_ranges", "-m", installer, "--if-stale", sys.prefix]
    tree = str(Path(runtime.__file__).parents[1])
    # The daemon never forks. A group of its own, so that what it started can be ended with it.
    pid = os.posix_spawn(
        sys.executable,
        words,
        {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": tree},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ],
        setpgroup=0,
    )
    os.setpriority(os.PRIO_PROCESS, pid, _NICE)
    pidfd = pidfd_open(pid)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), _DEADLINE_S)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException as error:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if isinstance(error, TimeoutError):
            return None
        raise
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
