"""Which platform this machine is, and which of an index's entries fits it best (OCI image-index, GOARCH names).

Refuses to guess: an entry for another system or processor never fits. Invariant: `rank` orders the entries that fit
from best (0) upwards, so that two machines of one kind choose the same manifest.
"""

from __future__ import annotations

import os
import re

from imagestore.model import ReferenceInvalid
from runtime.linux.dataclass import dataclass

_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v7"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
    "loongarch64": ("loong64", ""),
}
# What a processor without a variant stands for, and spellings that mean the same.
_IMPLIED = {"amd64": "v1", "arm64": "v8", "arm": "v7"}
_ALIASES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "armhf": "arm", "armel": "arm", "i386": "386"}
_PART = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_VERSION = re.compile(r"v([0-9]{1,2})(?:\.[0-9]{1,2})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Platform:
    """os/architecture[/variant] in the names of the image-spec."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def rank(self, offered: Platform) -> int | None:
        """How far `offered` is from the best that this platform can run; None when it cannot run it.

        A newer processor runs what was built for an older variant of it: v8 runs v8, arm v7 runs v7, v6 and v5.
        """
        architecture = _ALIASES.get(offered.architecture, offered.architecture)
        if offered.os != self.os or architecture != self.architecture:
            return None
        mine, theirs = _level(self), _level(offered)
        if mine is None or theirs is None:
            return 0 if self.variant == offered.variant else None
        return mine - theirs if theirs <= mine else None


def _level(platform: Platform) -> int | None:
    architecture = _ALIASES.get(platform.architecture, platform.architecture)
    match = _VERSION.fullmatch(platform.variant or _IMPLIED.get(architecture, "v0"))
    return int(match[1]) if match else None


def host_platform() -> Platform:
    """The platform of this machine as uname(2) tells it."""
    machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return Platform("linux", architecture, variant)


def parse_platform(text: str) -> Platform:
    """ "linux/arm64/v8" as a value. Raises ReferenceInvalid."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(_PART.fullmatch(part) for part in parts):
        raise ReferenceInvalid(f"platform {text[:100]!r}: expected os/architecture or os/architecture/variant")
    return Platform(parts[0], _ALIASES.get(parts[1], parts[1]), parts[2] if len(parts) == 3 else "")
