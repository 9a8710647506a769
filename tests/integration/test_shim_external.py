"""A runtime binary that takes too long: it is ended, and so is whom it has started."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import RuntimeFailure
from runtime.shim.external import ExternalEngine
from runtime.shim.protocol import CheckpointMessage


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
    state = Path("/proc", started, "stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
