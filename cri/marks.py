"""How pods of `ocid run` are told from a kubelet's, and what our command line asks for that the CRI has no word for.
Imports nothing: every command needs it."""

from __future__ import annotations

# They live in this Kubernetes namespace, so that they never meet a kubelet's.
NAMESPACE = "ocid"
NAME_LABEL = "ocid.name"
# What a daemon answers that has begun to serve and still recovers; our own commands wait for it.
RECOVERING = "ocid is starting and recovers its pods; try again in a moment"
# On pods of `ocid pod play` and their containers: the pod's name.
POD_LABEL = "ocid.pod"
# Annotation of such a pod: seconds that its containers have to end, when it is taken down.
GRACE = "ocid.grace"
# Below ROOT, a directory for each pod's uid.
LOGS = "logs"
VOLUMES = "volumes"
# Annotations of a container. "true": a PID 1 that reaps is put before its command (runtime/reaper.py).
INIT = "ocid.init"
# no, on-failure[:N] or always: whether its shim starts it again after it has ended (runtime/shim/restarts.py).
RESTART = "ocid.restart"
# Limits of its processes, and filesystems in memory (cri/spec/by_annotation.py).
ULIMITS = "ocid.ulimits"
TMPFS = "ocid.tmpfs"
