"""What people get wrong: ids that are none, containers in another state than they think, limits that cannot be. Each
ends at once, with an exit code that says so and a sentence that names what was meant; and the container runs on."""

from __future__ import annotations

import json
import os

from conformance.crictl.steps import Scenario, check, eventually


def _refused(it: Scenario, *words: str, because: str) -> None:
    said = it.crictl.fails(*words)
    check(because in said, f"crictl {' '.join(words)}: expected {because!r} in it, got {said!r}")


def unknown(it: Scenario) -> None:
    """Of no container, pod or image."""
    for words in (["inspect"], ["rm"], ["logs"], ["start"], ["update"], ["attach"], ["inspectp"], ["rmp"]):
        _refused(it, *words, "no-such", because="code = NotFound")
    for more in (
        ["exec", "no-such", "true"],
        ["exec", "--sync", "no-such", "true"],
        ["port-forward", "no-such", ":80"],
    ):
        _refused(it, *more, because="code = NotFound")
    for word in ("inspecti", "rmi"):
        _refused(it, word, "no-such", because="no such image")


def prefixes(it: Scenario) -> None:
    """The beginning of an id will do, as long as it is that of one."""
    check(it.crictl.ok("exec", "--sync", it.container[:8], "echo", "here") == "here", "a prefix is not found")
    _refused(it, "exec", "--sync", f"{it.container[:8]}-", "true", because="code = NotFound")
    made: list[str] = []
    try:
        while not (alike := [one for one in made if one[0] == it.container[0]]):
            made.append(it.crictl.ok("create", it.pod, _file(it, f"alike-{len(made)}", "true"), it.pod_file))
        for words in (["inspect"], ["stop"], ["exec", "--sync"]):
            said = it.crictl.fails(*words, alike[0][0], *(["true"] if words[0] == "exec" else []))
            check(alike[0] not in said and it.container not in said, f"it has chosen one of several: {said!r}")
    finally:
        it.crictl.ok("rm", *made)


def _file(it: Scenario, name: str, *command: str) -> str:
    path = it.directory / f"{name}.json"
    document = {"metadata": {"name": name}, "image": {"image": it.image}, "command": command, "log_path": f"{name}.log"}
    path.write_text(json.dumps(document))
    return str(path)


def states(it: Scenario) -> None:
    """A container that was not started yet, one that runs, one that has ended."""
    one = it.crictl.ok("create", it.pod, _file(it, "brief", "sh", "-c", "exit 3"), it.pod_file)
    into = (["exec", one, "true"], ["exec", "--sync", one, "true"], ["attach", one])
    for words in into:
        it.crictl.fails(*words)
    it.crictl.ok("start", one)
    eventually(lambda: it.crictl.json("inspect", one)["status"]["state"] == "CONTAINER_EXITED", "it ends")
    for words in (*into, ["start", one]):
        it.crictl.fails(*words)
    it.crictl.ok("stop", one)  # as often as one likes
    _refused(it, "start", it.container, because=it.container)
    _refused(it, "rm", it.container, because="is running, please stop it first")
    _refused(it, "rmp", it.pod, because="is running, please stop it first")
    os.unlink(it.logs / "brief.log")
    _refused(it, "logs", one, because="no such file")
    it.crictl.ok("rm", one)


def nonsense(it: Scenario) -> None:
    """Limits that cannot be, commands that are not there, ports where nobody listens; nothing of it ends anybody."""
    for words in (["--memory", "1"], ["--memory", "-5"], ["--cpuset-cpus", "x"], ["--cpuset-cpus", "9999"]):
        it.crictl.fails("update", *words, it.container)
    for words in (["exec"], ["exec", "--sync"]):
        _refused(it, *words, it.container, "/no/such", because="stat /no/such: no such file or directory")
        _refused(it, *words, it.container, "/etc", because="permission denied")
    _refused(it, "exec", "--sync", "--timeout", "1", it.container, "sleep", "20", because="timed out after 1s")
    _refused(it, "exec", it.container, "sh", "-c", "kill -9 $$", because="exit code 137")
    check(it.crictl.ok("exec", it.container, "echo", "still") == "still", "the container is gone")


STEPS = (unknown, prefixes, states, nonsense)
