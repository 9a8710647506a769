"""What /proc says about cgroups: the hierarchies that are mounted, and where a process is in them.

Refuses to write anything and to choose a path. See cgroups(7), proc_pid_cgroup(5), proc_pid_mountinfo(5).
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in runtime.fields: not worth an import on the way to a container
if TYPE_CHECKING:
    from collections.abc import Iterator


def cgroup_mounts(mountinfo: str = "/proc/self/mountinfo") -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    """Every cgroup mount as (mount point, root of the mount, 1 or 2, the v1 controllers and names in it).

    Reads lines itself rather than through runtime.linux.mount: a node has a thousand mounts, of which ten matter here.
    """
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            if not right.startswith("cgroup"):
                continue
            words, tail = left.split(" "), right.split()
            target, root = _unescape(words[4]), _unescape(words[3])
            if tail[0] == "cgroup2":
                yield target, root, 2, ()
            elif tail[0] == "cgroup":
                # Super options hold "rw" and the like beside the controllers; the reader knows which names it wants.
                yield target, root, 1, tuple(tail[2].split(",")) if len(tail) > 2 else ()


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def cgroups_of(pid: int | str = "self", proc: str = "/proc") -> dict[str, str]:
    """proc_pid_cgroup(5): where `pid` is, by v1 controller ("cpu", "name=systemd") and "" for v2."""
    found: dict[str, str] = {}
    with open(f"{proc}/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            # A path may hold colons: only the first two separate.
            number, controllers, path = line.rstrip("\n").split(":", 2)
            if number == "0" and not controllers:
                found[""] = path
            else:
                for name in controllers.split(","):
                    found[name] = path
    return found
