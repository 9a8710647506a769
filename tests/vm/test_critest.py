"""critest's specs of AppArmor, which need a kernel with it: profiles of the node over the CRI, by both fields."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conformance.critest.tool import ROOT

SPECS = 9


def test_profiles_of_the_node_over_the_cri() -> None:
    layouts = list((ROOT / ".cache/images").glob("critest-*"))
    if not layouts:
        pytest.skip("critest is not on the clone's disk: the machine that made it had no Go compiler")
    command = [sys.executable, "-m", "conformance.critest", "--runtime", "ocid", "--focus", "AppArmor"]
    done = subprocess.run([*command, "--layout", str(layouts[0])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{SPECS} passed, 0 skipped, 0 wrong" in done.stdout, done.stdout
