"""These tests change a machine's init, so they run in the one that hack/vm boots and nowhere else.

OCID_RUNTIME names another runtime for the tests that show what any runtime should do: `hack/vm --runtime runc`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import Bundles, bundles
from tests.vm.units import Units, units

if not os.environ.get("OCID_VM"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    with bundles(tmp_path) as opened:
        yield opened


@pytest.fixture
def managed(tmp_path: Path) -> Iterator[Units]:
    with units(tmp_path) as opened:
        yield opened
