"""What a case works in: a directory, a state root and a cgroup parent of its own, bundles, and the runtime on them.

The runtime is a command line and nothing else. Output goes through files, since a created container keeps the pipes
that a caller would wait for. `Box.close` takes everything away with the runtime's own `delete --force`, and says what
is left after that: state, cgroups, processes, mounts. Invariant: outside of a case nothing runs in the worker's pid
namespace but the worker, so whatever else does was left by the case.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conformance.harness import kernel
from conformance.harness.bundle import Bundle
from conformance.harness.kernel import eventually
from conformance.harness.rootfs import make_rootfs

# How long what was just killed may take to be reaped.
SETTLE_S = 5.0
COMMAND_LIMIT_S = 40.0


class Result:
    """What a command said; `text` and `error` are stdout and stderr."""

    def __init__(self, words: Sequence[str], code: int, text: str, error: str) -> None:
        self.words = words
        self.code = code
        self.text = text
        self.error = error

    def __repr__(self) -> str:
        return f"{' '.join(self.words)}: code {self.code}, stdout {self.text[-1500:]!r}, stderr {self.error[-1500:]!r}"

    def ok(self) -> str:
        """stdout of a success."""
        assert self.code == 0, self
        return self.text

    def lines(self) -> list[str]:
        """stdout of a success, by lines."""
        return self.ok().splitlines()

    def json(self) -> Any:
        """stdout of a success, parsed."""
        return json.loads(self.ok())

    def failed(self, *phrases: str, code: int | None = None) -> str:
        """stderr of a failure; it must hold every one of `phrases`, in any case of letters, quoted or not."""
        assert self.code != 0 and (code is None or self.code == code) and self.error.strip(), self
        said = self.error.replace('\\"', '"').lower()
        for phrase in phrases:
            assert phrase.lower() in said, f"{phrase!r} is not in what was said: {self!r}"
        return self.error


class Box:
    """One case's own place."""

    def __init__(self, runtime: str, directory: Path, cgroup: str) -> None:
        self.runtime = runtime
        self.directory = directory
        self.root = directory / "state"
        self.cgroup = cgroup
        self.flags: tuple[str, ...] = ()  # global flags for every command of the case
        self.last: Result | None = None  # what the last command said, for the message of a failure
        self._made: list[Bundle] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._outputs = 0
        self._own = {os.getpid(), os.getppid()}
        self._mounts = [(point.target, point.source) for point in kernel.mounts()]
        (directory / "output").mkdir()

    # ----------------------------------------------------------------------------------------------- bundles

    def bundle(self, *args: str) -> Bundle:
        """A bundle that runs `args`, or sleeps."""
        # An id of its own, as for a container: some things of the kernel (keys) outlive it and are named after it.
        name = f"c{len(self._made)}-{secrets.token_hex(4)}"
        path = self.directory / name
        make_rootfs(path / "rootfs", self.directory.parent)
        made = Bundle(self, name, path, list(args or ("sleep", "1000")))
        self._made.append(made)
        return made

    def last_bundle(self) -> Bundle:
        """The bundle that was made last."""
        return self._made[-1]

    def sh(self, script: str) -> Bundle:
        """A bundle that runs a shell script."""
        return self.bundle("sh", "-c", script)

    def path(self, name: str) -> Path:
        """A path in the case's directory that nothing else uses."""
        return self.directory / f"own-{name}"

    def make_directory(self, name: str, **files: str) -> Path:
        """A directory of the case's own, with files in it."""
        made = self.path(name)
        made.mkdir()
        for key, text in files.items():
            (made / key).write_text(text)
        return made

    # ---------------------------------------------------------------------------------------------- commands

    def command(self, *words: str) -> list[str]:
        """The command line of the runtime with this box's root."""
        return [self.runtime, "--root", str(self.root), *self.flags, *words]

    def popen(self, *words: str, **changes: Any) -> subprocess.Popen[bytes]:
        """The runtime with this box's root, not waited for; `changes` are Popen's."""
        return self.spawn(self.command(*words), **changes)

    def spawn(self, words: Sequence[str], **changes: Any) -> subprocess.Popen[bytes]:
        """Any program; killed at the case's end if it has not ended."""
        for stream in ("stdin", "stdout", "stderr"):
            changes.setdefault(stream, subprocess.DEVNULL)
        child = subprocess.Popen(words, **changes)
        self._children.append(child)
        return child

    def call(self, *words: str, **changes: Any) -> Result:
        """The runtime with this box's root, run to its end."""
        return self.execute(self.command(*words), **changes)

    def execute(
        self, words: Sequence[str], input: str | None = None, limit_s: float = COMMAND_LIMIT_S, **changes: Any
    ) -> Result:
        """Any program, run to its end."""
        base = self.directory / "output" / str(self._outputs)
        self._outputs += 1
        with open(f"{base}.in", "wb+") as given, open(f"{base}.out", "wb+") as out, open(f"{base}.err", "wb+") as err:
            if input is not None:
                given.write(input.encode())
                given.seek(0)
                changes["stdin"] = given
            changes.setdefault("stdout", out)
            changes.setdefault("stderr", err)
            child = self.spawn(words, **changes)
            try:
                code = child.wait(limit_s)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"not within {limit_s:g} s: {' '.join(words)}") from None
            out.seek(0)
            err.seek(0)
            # A shell's way to say a signal, as callers see it.
            code = 128 - code if code < 0 else code
            said = (stream.read().decode(errors="replace") for stream in (out, err))
            self.last = Result(words, code, *said)
            return self.last

    # ------------------------------------------------------------------------------------------------- the end

    def close(self) -> list[str]:
        """Takes everything away; a sentence for each thing that the runtime left or would not remove."""
        left: list[str] = []
        for child in self._children:
            if child.poll() is None:
                child.kill()
                child.wait()
        left += self._delete_containers()
        left += self._processes_left()
        left += [f"cgroup {path}" for path in self._cgroups_left()]
        if self.root.is_dir():
            left += [f"state {name}" for name in self._state()]
        mounts = [(point.target, point.source) for point in kernel.mounts()]
        for target, source in reversed(
            mounts[len(self._mounts) :] if mounts[: len(self._mounts)] == self._mounts else []
        ):
            left.append(f"mount of {source} at {target}")
        if mounts != self._mounts and not left:
            left.append(f"mounts are not what they were: {sorted(set(self._mounts) ^ set(mounts))}")
        return left

    def _state(self) -> list[str]:
        return [name for name in sorted(os.listdir(self.root)) if not name.startswith(".")]

    def _delete_containers(self) -> list[str]:
        left = []
        if self.root.is_dir():
            for name in self._state():
                gone = self.execute([self.runtime, "--root", str(self.root), "delete", "--force", name])
                if gone.code:
                    left.append(f"delete --force {name}: {gone.error.strip()}")
        return left

    def _processes_left(self) -> list[str]:
        def others() -> list[int]:
            return [pid for pid in kernel.processes() if pid not in self._own]

        try:
            eventually(lambda: not others(), "processes to end", SETTLE_S)
        except AssertionError:
            pass
        left = []
        for pid in others():
            try:
                said = kernel.proc(pid, "cmdline").replace("\0", " ").strip()
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
            left.append(f"process {pid} ({said})")
        eventually(lambda: not others(), "what was killed to end", SETTLE_S)
        return left

    def _cgroups_left(self) -> list[str]:
        """What is below this box's cgroup parent in any hierarchy. The parents themselves are no leak: the case named
        them, and a runtime that is told a path makes what is above it."""
        left = []
        for top in kernel.hierarchies():
            parent = top / self.cgroup.lstrip("/")
            if parent.is_dir():
                left += [str(entry) for entry in parent.iterdir() if entry.is_dir()]
        kernel.remove_cgroup(self.cgroup)
        return left


def receive_terminal(listener: socket.socket) -> int:
    """The master of a terminal, as a runtime sends it to a console socket."""
    listener.settimeout(15)
    connection, _ = listener.accept()
    with connection:
        _, descriptors, _, _ = socket.recv_fds(connection, 4096, 4)
    assert len(descriptors) == 1, f"{len(descriptors)} descriptors came over the console socket"
    return descriptors[0]


def listen(path: Path) -> socket.socket:
    """A listening unix socket."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen(8)
    return made
