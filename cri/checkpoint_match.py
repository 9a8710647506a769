"""Whether an archive is of what a RestorePod expects: image, command, directory and environment, as the archive says
that they were, beside those of the request.

An archive brings the processes; these fields of a request start nothing and change nothing, they say which processes
the caller expects. This is against a mistake, another container's archive or one of before an update: who writes an
archive writes what it says of itself, too (threats S71), and a process is free to overwrite its own command line. So no
right hangs on it; ids, capabilities, filters and mounts are compared with the processes themselves (runtime.restored).
Refuses by the request's field, and tells no value, which may be a secret. Invariant: nothing of what is read here goes
anywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from cri.errors import InvalidArgument

# What the environment is given where neither request nor image has it (cri/spec/build): of the user, pod and terminal.
_GIVEN = frozenset({"PATH", "HOME", "HOSTNAME", "TERM"})


def compare(
    field: str, name: str, process: Mapping[str, Any], asked: Collection[str], image_id: str, about: bytes, spec: bytes
) -> None:
    """`process` is that of config.json as the request and its image make it, `asked` the variables that these two
    name; `about` and `spec` are the archive's config.dump and spec.dump. Raises InvalidArgument by `field`."""
    facts, known = _object(name, "config.dump", about), _object(name, "spec.dump", spec).get("process")
    if not isinstance(known, dict):
        raise InvalidArgument(f"checkpoint_path: container {name!r}: its spec.dump describes no process")
    if facts.get("rootfsImageRef") != image_id:
        raise InvalidArgument(f"{field}.image: the archive of container {name!r} is of another image than {image_id}")
    if known.get("args") != process["args"]:
        raise InvalidArgument(f"{field}: command and args: the archive of container {name!r} is of another command")
    if known.get("cwd") != process["cwd"]:
        raise InvalidArgument(f"{field}.working_dir: the archive of container {name!r} is of another directory")
    ours, theirs = _variables(process["env"]), _variables(known.get("env"))
    for variable in sorted(ours.keys() | theirs.keys()):
        if variable in _GIVEN and variable not in asked:
            continue
        if ours.get(variable) != theirs.get(variable):
            other = f"has another {variable[:80]!r}, or none, or is alone in having it"
            raise InvalidArgument(f"{field}.envs: the archive of container {name!r} {other}")


def _variables(entries: object) -> dict[str, str]:
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return {}
    return {entry.partition("=")[0]: entry for entry in entries}


def _object(name: str, file: str, raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidArgument(f"checkpoint_path: container {name!r}: its {file} is no JSON object")
    return found
