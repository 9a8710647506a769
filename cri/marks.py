"""How pods of `ocid run` are told from a kubelet's. Imports nothing: every command needs it."""

from __future__ import annotations

# They live in this Kubernetes namespace, so that they never meet a kubelet's.
NAMESPACE = "ocid"
NAME_LABEL = "ocid.name"
# Below ROOT, a directory for each pod's uid.
LOGS = "logs"
