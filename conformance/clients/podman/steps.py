"""All steps of podman, in the order they are played."""

from __future__ import annotations

from conformance.clients.podman import confinement, files, life, namespaces

STEPS = (*life.STEPS, *confinement.STEPS, *files.STEPS, *namespaces.STEPS)
