"""From pull to rmi, each call tried as a user would and checked for its effect: in crictl's listings, on the kernel's
side (pids, addresses) and in the log file. Steps run in order and share what they made."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conformance.crictl import observe, odd, streams
from conformance.crictl.steps import PAGE_PATH, Scenario, check, eventually


def version(it: Scenario) -> None:
    text = it.crictl.ok("version")
    check("RuntimeApiVersion:  v1" in text, f"version says {text!r}")


def info(it: Scenario) -> None:
    conditions = it.crictl.json("info")["status"]["conditions"]
    missing = [condition for condition in conditions if not condition["status"]]
    check(not missing, f"not ready: {missing}")


def pull(it: Scenario) -> None:
    text = it.crictl.ok("pull", it.image)
    check("sha256:" in text or it.image in text, f"pull says {text!r}")


def pull_unknown(it: Scenario) -> None:
    text = it.crictl.fails("pull", it.image.replace("busybox", "no-such-image"))
    check("no-such-image" in text, f"the error does not name the image: {text!r}")


def images(it: Scenario) -> None:
    check(it.image in _tags(it), f"images shows {_tags(it)}")
    status = it.crictl.json("inspecti", it.image)["status"]
    check(status["id"].startswith("sha256:") and int(status["size"]) > 100_000, f"inspecti shows {status}")


def _tags(it: Scenario) -> list[str]:
    return [tag for image in it.crictl.json("images", "-o", "json")["images"] for tag in image["repoTags"]]


def runp(it: Scenario) -> None:
    it.pod_file.write_text(
        json.dumps(
            {
                "metadata": {"name": "web", "namespace": "scenario", "uid": "scenario-web", "attempt": 1},
                "hostname": "web",
                "log_directory": str(it.logs),
                "labels": {"app": "web"},
                "linux": {"cgroup_parent": it.cgroup},
            }
        )
    )
    it.logs.mkdir()
    it.pod = it.crictl.ok("runp", it.pod_file)
    check(len(it.pod) >= 12, f"runp prints {it.pod!r}")


def pods(it: Scenario) -> None:
    items = it.crictl.json("pods", "--label", "app=web", "-o", "json")["items"]
    check([item["id"] for item in items] == [it.pod], f"pods shows {items}")
    check(items[0]["state"] == "SANDBOX_READY", f"pods shows state {items[0]['state']}")
    check(not it.crictl.json("pods", "--label", "app=other", "-o", "json")["items"], "the label filter lets all pass")


def create(it: Scenario) -> None:
    command = "echo started; echo oops >&2; exec httpd -f -v -h /www"
    it.container_file.write_text(
        json.dumps(
            {
                "metadata": {"name": "server"},
                "image": {"image": it.image},
                "command": ["sh", "-c", command],
                "envs": [{"key": "GREETING", "value": "hello world"}],
                "log_path": "server.log",
                "labels": {"role": "server"},
                "linux": {"resources": {"memory_limit_in_bytes": 64 << 20}},
            }
        )
    )
    it.container = it.crictl.ok("create", it.pod, it.container_file, it.pod_file)
    check(_state(it) == "CONTAINER_CREATED", f"ps -a shows {_state(it)}")


def _state(it: Scenario) -> str:
    containers = it.crictl.json("ps", "-a", "-o", "json")["containers"]
    return next((str(one["state"]) for one in containers if one["id"] == it.container), "nothing")


def start(it: Scenario) -> None:
    it.crictl.ok("start", it.container)
    check(_state(it) == "CONTAINER_RUNNING", f"ps shows {_state(it)} after start")


def ps(it: Scenario) -> None:
    running = it.crictl.json("ps", "--pod", it.pod, "--state", "Running", "-o", "json")["containers"]
    check([one["id"] for one in running] == [it.container], f"ps shows {running}")
    check(running[0]["labels"].get("role") == "server", f"ps shows labels {running[0]['labels']}")
    check(it.container[:13] in it.crictl.ok("ps"), "the table of ps does not show the container")


def inspect(it: Scenario) -> None:
    document = it.crictl.json("inspect", it.container)
    status = document["status"]
    check(status["metadata"]["name"] == "server", f"inspect shows {status['metadata']}")
    check(status["logPath"] == str(it.logs / "server.log"), f"inspect shows log path {status['logPath']}")
    it.pid = int(document["info"]["pid"])
    arguments = Path(f"/proc/{it.pid}/cmdline").read_bytes()
    check(b"httpd" in arguments or b"sh" in arguments, f"pid {it.pid} runs {arguments!r}")


def inspectp(it: Scenario) -> None:
    status = it.crictl.json("inspectp", it.pod)["status"]
    address = status["network"]["ip"]
    check(status["state"] == "SANDBOX_READY", f"inspectp shows {status['state']}")
    eventually(lambda: _get(address), f"http://{address} answers")


def _get(address: str) -> bytes:
    try:
        with urllib.request.urlopen(f"http://{address}{PAGE_PATH}", timeout=2) as reply:
            return bytes(reply.read())
    except OSError:
        return b""


def exec_sync(it: Scenario) -> None:
    text = it.crictl.ok("exec", "-s", it.container, "sh", "-c", 'echo "$GREETING from $(hostname)"')
    check(text == "hello world from web", f"exec -s prints {text!r}")
    text = it.crictl.fails("exec", "-s", it.container, "sh", "-c", "exit 3")
    check("3" in text, f"exec -s of exit 3 says {text!r}")
    text = it.crictl.fails("exec", "-s", it.container, "/no/such/command")
    check("/no/such/command" in text, f"exec -s of a missing command says {text!r}")


def logs(it: Scenario) -> None:
    eventually(lambda: "started" in it.crictl.ok("logs", it.container), "logs shows what was printed")
    result = it.crictl.run("logs", it.container)
    check("started" in result.stdout and "oops" in result.stderr, f"logs prints {result.stdout!r}, {result.stderr!r}")
    lines = (it.logs / "server.log").read_text().splitlines()
    check(any(line.split(" ", 3)[1:] == ["stdout", "F", "started"] for line in lines), f"the log file holds {lines}")


def stats(it: Scenario) -> None:
    shown = it.crictl.json("stats", "--id", it.container, "-o", "json")["stats"]
    check(len(shown) == 1, f"stats shows {shown}")
    used = int(shown[0]["memory"]["workingSetBytes"]["value"])
    check(0 < used < 64 << 20, f"stats shows {used} bytes in use of a limit of 64 MiB")


def stop(it: Scenario) -> None:
    it.crictl.ok("stop", "--timeout", "1", it.container)
    check(_state(it) == "CONTAINER_EXITED", f"ps -a shows {_state(it)} after stop")
    check(not os.path.exists(f"/proc/{it.pid}"), f"pid {it.pid} lives on after stop")
    document: Any = it.crictl.json("inspect", it.container)["status"]
    check(document["exitCode"] in (137, 143), f"exit code {document['exitCode']} after stop")


def rm(it: Scenario) -> None:
    it.crictl.ok("rm", it.container)
    check(_state(it) == "nothing", f"ps -a shows {_state(it)} after rm")
    text = it.crictl.fails("inspect", it.container)
    check(it.container[:12] in text or "not found" in text.lower(), f"inspect of a removed container says {text!r}")


def stopp(it: Scenario) -> None:
    it.crictl.ok("stopp", it.pod)
    items = it.crictl.json("pods", "--id", it.pod, "-o", "json")["items"]
    check(items[0]["state"] == "SANDBOX_NOTREADY", f"pods shows {items[0]['state']} after stopp")


def rmp(it: Scenario) -> None:
    it.crictl.ok("rmp", it.pod)
    check(not it.crictl.json("pods", "-o", "json")["items"], "pods shows the pod after rmp")


def rmi(it: Scenario) -> None:
    it.crictl.ok("rmi", it.image)
    check(it.image not in _tags(it), f"images shows {_tags(it)} after rmi")


STEPS: tuple[Callable[[Scenario], None], ...] = (
    version,
    info,
    pull,
    pull_unknown,
    images,
    runp,
    pods,
    create,
    start,
    ps,
    inspect,
    inspectp,
    exec_sync,
    *streams.STEPS,
    logs,
    stats,
    *observe.STEPS,
    *odd.STEPS,
    stop,
    rm,
    stopp,
    rmp,
    rmi,
)
