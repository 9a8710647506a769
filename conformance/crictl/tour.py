"""Every subcommand of crictl as a user would try it, with what it prints, as docs/crictl.md.

    python -m conformance.crictl --transcript docs/crictl.md

Refuses to write where a command ends otherwise than it should, or a subcommand of this crictl was not tried. Invariant:
a second run writes the same, but for what has changed (`stable`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conformance.clients.terminal import Terminal
from conformance.crictl.stable import Stable
from conformance.crictl.steps import PAGE_PATH, WAIT_S, check, eventually
from conformance.crictl.tool import CheckFailed, Crictl

_MOST = 24  # lines of one command's output that are shown
_HEAD = """\
# crictl against ocid

Every subcommand of crictl {version}, tried as a user would. Made by `python -m conformance.crictl --transcript
docs/crictl.md`, against a daemon of its own with the configuration of `conformance/daemons.py`; the endpoint is in
`CONTAINER_RUNTIME_ENDPOINT`. Ids, times, ports and pids are made the same from run to run, `#` is a figure of use, and
`…` stands for what was left out. The scenario of `conformance/crictl` plays more of it, and looks at what came of it.
"""


class Tour:
    """Commands as they were given, with their output. `used` are the subcommands that were tried."""

    def __init__(self, crictl: Crictl, image: str, directory: Path, cgroup: str) -> None:
        self.crictl, self.image, self.directory, self.cgroup = crictl, image, directory, cgroup
        self.used: set[str] = set()
        self._lines: list[str] = []
        self._stable = Stable({str(directory.parent): "/demo", cgroup.lstrip("/"): "demo"})

    def section(self, title: str, text: str = "") -> None:
        self._lines += ["", f"## {title}", ""] + ([text, ""] if text else [])

    def file(self, name: str, content: object) -> str:
        """A file that commands name, shown as it is written."""
        text = json.dumps(content, indent=2)
        (self.directory / name).write_text(text)
        self.note(f"$ cat {name}", text, most=100)
        return name

    def run(self, *words: object, fails: bool = False, figures: bool = False, most: int = _MOST, data: str = "") -> str:
        """A command and what it prints. Raises CheckFailed when it ends otherwise."""
        done = subprocess.run(
            self.crictl.command(*words),
            cwd=self.directory,
            input=data,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if bool(done.returncode) is not fails:
            raise CheckFailed(f"crictl {words} exits {done.returncode}: {done.stdout}{done.stderr}")
        said = "\n".join(part for part in (done.stdout.rstrip(), done.stderr.rstrip()) if part)
        typed = f"printf {data!r} | " if data else ""
        self.used.add(str(words[0]))
        self.note(f"$ {typed}crictl {_quoted(words)}", said, figures=figures, most=most)
        return done.stdout.strip()

    def note(self, command: str, said: str, *, figures: bool = False, most: int = _MOST) -> None:
        """A command, and what it said, as lines of the document."""
        shown = self._stable.text(said, figures=figures).splitlines()
        if len(shown) > most:
            shown = [*shown[:most], "…"]
        self._lines += ["```console", self._stable.text(command), *(line.rstrip() for line in shown), "```"]

    @contextmanager
    def beside(self, *words: object) -> Iterator[subprocess.Popen[str]]:
        """A command that goes on while others are given; its output is the caller's to show."""
        self.used.add(str(words[0]))
        command = self.crictl.command(*words)
        with subprocess.Popen(
            command, cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                yield process
            finally:
                process.terminate()
                process.wait(WAIT_S)

    def show(self, words: tuple[object, ...], said: str, *, most: int = _MOST) -> None:
        """What a command of `beside` said."""
        self.note(f"$ crictl {_quoted(words)}", said, most=most)

    def terminal(self, words: tuple[object, ...], typed: str, until: str) -> None:
        """A command on a terminal, at which one line is typed, then `exit`."""
        self.used.add(str(words[0]))
        with Terminal(self.crictl.command(*words), self.directory, os.environ, 24, 80) as terminal:
            terminal.until("# ")
            terminal.type(f"{typed}\n")
            said = terminal.until(until)
            terminal.type("exit\n")
            terminal.end()
        self.note(f"$ crictl {_quoted(words)}", "/ # " + said.replace("\r", "").strip() + "\n/ # exit")

    def document(self, version: str) -> str:
        return _HEAD.format(version=version) + "\n".join(self._lines) + "\n"


def _quoted(words: tuple[object, ...]) -> str:
    return " ".join(text if re.fullmatch(r"[\w@%+=:,./-]+", text := str(word)) else f"'{text}'" for word in words)


def subcommands(crictl: Crictl) -> set[str]:
    """What `crictl --help` lists."""
    text = crictl.ok("--help")
    listed = text.partition("COMMANDS:\n")[2].partition("\n\n")[0]
    return {line.split()[0].rstrip(",") for line in listed.splitlines()}


def transcript(crictl: Crictl, image: str, directory: Path, cgroup: str) -> str:
    """The document. Raises CheckFailed."""
    tour = Tour(crictl, image, directory, cgroup)
    (directory / "logs").mkdir(exist_ok=True)
    _node(tour)
    _images(tour)
    pod, container = _made(tour)
    _looked_at(tour, pod, container)
    _streams(tour, pod, container)
    _figures(tour, pod, container)
    _events(tour, pod)
    _ended(tour, pod, container)
    left = subcommands(crictl) - tour.used - {"help"}
    check(not left, f"not tried: {sorted(left)}")
    return tour.document(crictl.ok("--version").split()[-1])


def _node(tour: Tour) -> None:
    tour.section("The node")
    tour.run("version")
    tour.run("info", most=60)
    tour.run("runtime-config")
    tour.run("update-runtime-config", "--pod-cidr", "10.88.0.0/16")
    tour.run("config", "--set", "timeout=10")
    tour.run("config", "--list")
    tour.run("completion", "bash", most=6)


def _images(tour: Tour) -> None:
    tour.section("Images")
    tour.run("pull", tour.image)
    tour.run("pull", tour.image.replace("busybox", "no-such-image"), fails=True)
    tour.run("images")
    tour.run("inspecti", tour.image, most=40)
    tour.run("imagefsinfo", figures=True)


def _made(tour: Tour) -> tuple[str, str]:
    tour.section("A pod and a container")
    pod_file = tour.file(
        "pod.json",
        {
            "metadata": {"name": "web", "namespace": "default", "uid": "web-1", "attempt": 1},
            "hostname": "web",
            "log_directory": str(tour.directory / "logs"),
            "labels": {"app": "web"},
            "linux": {"cgroup_parent": tour.cgroup},
        },
    )
    container_file = tour.file(
        "server.json",
        {
            "metadata": {"name": "server"},
            "image": {"image": tour.image},
            "command": ["sh", "-c", "echo started; echo oops >&2; exec httpd -f -v -h /www"],
            "envs": [{"key": "GREETING", "value": "hello"}],
            "log_path": "server.log",
            "linux": {"resources": {"memory_limit_in_bytes": 64 << 20}},
        },
    )
    pod = tour.run("runp", pod_file)
    container = tour.run("create", pod, container_file, pod_file)
    tour.run("start", container)
    tour.section("All in one", "`run` makes a pod and a container in it, and starts that.")
    once = tour.file(
        "once.json",
        {"metadata": {"name": "once"}, "image": {"image": tour.image}, "command": ["true"], "log_path": "once.log"},
    )
    pod_once = tour.file(
        "pod-once.json",
        {
            "metadata": {"name": "once", "namespace": "default", "uid": "once-1", "attempt": 1},
            "log_directory": str(tour.directory / "logs"),
            "linux": {"cgroup_parent": tour.cgroup},
        },
    )
    made = tour.run("run", once, pod_once)
    eventually(lambda: "CONTAINER_EXITED" in tour.crictl.ok("inspect", made), "the container to end")
    other = tour.crictl.json("inspect", made)["info"]["sandboxID"]
    tour.run("rmp", "--force", other)
    return pod, container


def _looked_at(tour: Tour, pod: str, container: str) -> None:
    tour.section("What there is")
    tour.run("pods")
    tour.run("ps")
    tour.run("inspectp", pod, most=60)
    tour.run("inspect", container, most=60)
    eventually(lambda: "started" in tour.crictl.ok("logs", container), "the log to have a line")
    tour.run("logs", container)
    tour.run("logs", "no-such-container", fails=True)


def _streams(tour: Tour, pod: str, container: str) -> None:
    tour.section("Into a container")
    tour.run("exec", "--sync", container, "sh", "-c", 'echo "$GREETING from $(hostname)"')
    tour.run("exec", container, "sh", "-c", "echo out; echo err >&2; exit 7", fails=True)
    tour.run("exec", "-i", "--transport", "websocket", container, "wc", "-c", data="twelve bytes")
    tour.run("exec", container, "/no/such/command", fails=True)
    tour.terminal(("exec", "-it", container, "sh"), "stty size; echo $((6*7))", "42")
    tour.section("At a container", "A container that reads its input, and ends with it.")
    talker = tour.file(
        "talker.json",
        {
            "metadata": {"name": "talker"},
            "image": {"image": tour.image},
            "command": ["sh", "-c", 'while read line; do echo "said $line"; done; sleep 0.1'],
            "log_path": "talker.log",
            "stdin": True,
            "stdin_once": True,
        },
    )
    one = tour.run("create", pod, talker, "pod.json")
    tour.run("start", one)
    tour.run("attach", "-i", one, data="one\ntwo\n")
    eventually(lambda: "CONTAINER_EXITED" in tour.crictl.ok("inspect", one), "the container to end")
    tour.run("rm", one)
    tour.section("To a port of a pod")
    words = ("port-forward", pod, ":80")
    with tour.beside(*words) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+) -> ", said)
        if found is None:
            raise CheckFailed(f"crictl port-forward says {said!r}")
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}{PAGE_PATH}", timeout=WAIT_S) as reply:
            check(reply.status == 200, f"GET through the port gives {reply.status}")
            page = reply.read().decode()
    tour.show(words, said)
    tour.note(f"$ curl http://127.0.0.1:{found[1]}{PAGE_PATH}", page)


def _figures(tour: Tour, pod: str, container: str) -> None:
    tour.section("Use and limits")
    tour.run("stats", figures=True)
    tour.run("stats", "-o", "json", "--id", container, figures=True, most=50)
    tour.run("statsp", figures=True)
    tour.run("metricdescs", most=20)
    tour.run("metricsp", figures=True, most=40)
    tour.run("update", "--memory", 48 << 20, "--cpu-share", 512, container)
    status = tour.crictl.json("inspect", container)["status"]["resources"]["linux"]
    check(int(status["memoryLimitInBytes"]) == 48 << 20, f"inspect shows {status} after update")
    tour.section("Checkpoints", "Off unless the configuration enables them; tests/vm has them with a criu that works.")
    tour.run("checkpoint", "--export", "checkpoint.tar", container, fails=True)


def _events(tour: Tour, pod: str) -> None:
    tour.section("Events", "Of a short life, while `crictl events` runs beside it.")
    words = ("events", "--output", "go-template", "--template", "{{.containerId}} {{.containerEventType}}")
    with tour.beside(*words) as process:
        assert process.stdout is not None
        one, lines = "", ""
        # It says nothing when it is connected: lives are lived until it has told of one.
        os.set_blocking(process.stdout.fileno(), False)

        def told() -> bool:
            nonlocal one, lines
            one = tour.crictl.ok("create", pod, tour.directory / "once.json", tour.directory / "pod.json")
            tour.crictl.ok("start", one)
            tour.crictl.ok("stop", "--timeout", "0", one)
            tour.crictl.ok("rm", one)
            lines += _read(process.stdout.fileno())  # type: ignore[union-attr]
            return lines.count(one) >= 4

        eventually(told, "events to tell of a whole life")
    tour.show(words, "\n".join(line for line in lines.splitlines() if one in line))


def _read(fd: int) -> str:
    try:
        return os.read(fd, 1 << 20).decode()
    except BlockingIOError:
        return ""


def _ended(tour: Tour, pod: str, container: str) -> None:
    tour.section("The end")
    tour.run("stop", "--timeout", 1, container)
    tour.run("ps", "-a")
    tour.run("rm", container)
    tour.run("inspect", container, fails=True)
    tour.run("stopp", pod)
    tour.run("pods")
    tour.run("rmp", pod)
    tour.run("rmi", tour.image)
