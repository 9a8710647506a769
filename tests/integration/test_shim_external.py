"""A runtime binary that fails, or takes too long: whose fault it was, and that it is ended with whom it has started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.errors import RuntimeFailure
from runtime.shim.external import ExternalEngine
from runtime.shim.protocol import CheckpointMessage
from tests.support import eventually


@pytest.mark.parametrize(
    ("verb", "said", "code"),
    [
        ("start", 'exec: "x": executable file not found in $PATH', "invalid_argument"),
        ("start", "executable file `x` not found in $PATH: No such file or directory", "invalid_argument"),
        ("start", "openat2: permission denied", "internal"),
        ("update", 'failed to write "1": write cpu.cfs_period_us: invalid argument', "invalid_argument"),
    ],
)
def test_what_the_caller_got_wrong_is_told_from_what_the_node_has(
    tmp_path: Path, verb: str, said: str, code: str
) -> None:
    binary = tmp_path / "runtime"
    line = json.dumps({"level": "error", "msg": said})
    binary.write_text(f"#!/bin/sh\necho '{line}' >$4\nexit 1\n")
    binary.chmod(0o755)
    engine = ExternalEngine(str(binary), str(tmp_path), str(tmp_path))
    with pytest.raises(RuntimeFailure) as failed:
        engine.update("one", {}) if verb == "update" else engine.start("one")
    assert (failed.value.message, failed.value.code) == (f"{verb}: {said}", code)


def test_a_binary_that_does_not_end_in_its_time_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    binary = tmp_path / "runtime"
    binary.write_text(f"#!/bin/sh\ntrap '' TERM\nsleep 1000 &\necho $$ $! >{tmp_path}/pids\nwait\n")
    binary.chmod(0o755)
    engine = ExternalEngine(str(binary), str(tmp_path), str(tmp_path))
    message = CheckpointMessage("one", str(tmp_path), str(tmp_path), "criu", 1.0)
    with pytest.raises(
        RuntimeFailure, match=r"^checkpoint: .*/runtime did not end within 1 s, and was killed$"
    ) as late:
        engine.checkpoint(message)
    assert late.value.code == "deadline"
    runtime, started = (tmp_path / "pids").read_text().split()
    assert not Path("/proc", runtime).exists()
    eventually(lambda: _has_ended(started), what="what it has started to end")


def _has_ended(pid: str) -> bool:
    """True also of one that nobody has waited for."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
