"""Debian's podman, as root, with a store, state and network configuration of its own below one directory."""

from conformance.clients.podman.steps import STEPS
from conformance.clients.podman.tool import Podman, podman

__all__ = ["STEPS", "Podman", "podman"]
