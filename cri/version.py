"""What this software calls itself in Version, in logs and on the command line."""

from __future__ import annotations

NAME = "ocid"
VERSION = "0.1.0"
CRI_API = "v1"
