"""Tests that need a peer which is built for them: collected only by the lane that has built it."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("OCID_JUDGE") else ["test_*.py"]
