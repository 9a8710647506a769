"""The cases of conformance/run that need what only this machine has: cgroup v2 alone, and AppArmor. runc first."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("runtime", ["runc", "ocirun"])
def test_our_suite_on_cgroup_v2(runtime: str) -> None:
    command = [
        sys.executable,
        "-m",
        "conformance.run",
        "--runtime",
        runtime,
        "--needs",
        "cgroup2",
        "--needs",
        "apparmor",
    ]
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert said.returncode == 0, said.stdout
    # Whatever else a case lacks, these two abilities are what this machine is for.
    assert "this machine lacks" not in said.stdout, said.stdout
