"""Two of criu's images, read and written: what they say about seccomp filters, and about cgroups.

    magic 4 | magic of this kind 4 | (size 4 | protobuf message) …            all little endian (criu's images/*.proto)

Refuses to understand more of them than it needs. Invariant: reading is bounded, and what is not well formed is refused.
"""

from __future__ import annotations

import os
import struct

from runtime import criu
from runtime.errors import RuntimeFailure
from runtime.linux.files import AT_FDCWD, read_bounded, write_durable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_HEAD = struct.Struct("<8sI")
_MOST = 4 << 20
_FILTER, _PREVIOUS = 1, 2  # seccomp_filter
_FILTERS = 1  # seccomp_entry
_SETS = 1  # cgroup_entry
_SET_ID = 1  # cg_set_entry


def verify_filters(directory: str, program: bytes) -> None:
    """Every chain of filters in the images must begin with `program`, which their container was made with: all that
    runs in one descends from its init. Raises RuntimeFailure."""
    path = f"{directory}/seccomp.img"
    found = 0
    for raw in criu.repeated(_entry(path)[1], _FILTERS):
        filter_ = criu.fields(raw)
        if _PREVIOUS not in filter_:
            found += 1
            if filter_.get(_FILTER) != program:
                raise RuntimeFailure(
                    f"{path}: a seccomp filter is not the one that config.json describes",
                    hint="the container was made with another profile, or by another version of ocid",
                    code="failed_precondition",
                )
    if not found:
        raise RuntimeFailure(f"{path}: it has no seccomp filter", code="failed_precondition")


def replace_cgroups(directory: str, cgroups: Sequence[tuple[str, str]], *, own_namespace: bool) -> None:
    """Instead of the images' word about cgroups, which criu would make and change by it anywhere on the host: each set
    is `cgroups` ("cpu,cpuacct" and path, as proc_pid_cgroup(5) has them), the root of a cgroup namespace where there is
    an own one. Raises RuntimeFailure, OSError."""
    path = f"{directory}/cgroup.img"
    if not os.path.exists(path):
        return  # then criu leaves everybody where it is itself, which is right
    magic, entry = _entry(path)
    numbers = [criu.fields(raw).get(_SET_ID) for raw in criu.repeated(entry, _SETS)]
    members = [
        criu.message((1, names), (2, place), *([(3, len(os.fsencode(place)))] if own_namespace else []))
        for names, place in cgroups
    ]
    sets = [criu.message((_SET_ID, number), (2, members)) for number in numbers if isinstance(number, int)]
    # No directories: what is not named there is neither made nor changed.
    controllers = [criu.message((1, names.split(","))) for names, _ in cgroups]
    raw = criu.message((_SETS, sets), (2, controllers))
    write_durable(path, _HEAD.pack(magic, len(raw)) + raw, sync=False)


def _entry(path: str) -> tuple[bytes, bytes]:
    """Magic and the one message of an image. Raises RuntimeFailure."""
    try:
        raw = read_bounded(AT_FDCWD, path, _MOST)
    except OSError as error:
        raise RuntimeFailure.of(error, what=f"read {path}", code="invalid_argument") from None
    if len(raw) >= _HEAD.size:
        magic, size = _HEAD.unpack_from(raw)
        if len(raw) == _HEAD.size + size:
            return magic, raw[_HEAD.size :]
    raise RuntimeFailure(f"{path}: it is no image of criu's with one message", code="invalid_argument")
