"""How commands start the runtime that belongs to them. Refuses one of another installation, whatever PATH says."""

from __future__ import annotations

import os
import sys


def ocirun() -> list[str]:
    """The command of this installation, which goes on from a dump; or the same as an interpreter starts it."""
    installed = os.path.join(os.path.dirname(sys.executable), "ocirun")
    return [installed] if os.access(installed, os.X_OK) else [sys.executable, "-I", "-m", "runtime.cli"]
