"""`ocid pod`: a Kubernetes file becomes running pods and goes again, without a daemon and through one."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from conformance.leaks import CGROUPS
from tests.commands import COMMAND_S, logged, ocid, said
from tests.e2e import Node
from tests.support import eventually

pytestmark = pytest.mark.usefixtures("as_before")


@pytest.fixture(scope="module")
def cli(cli: Node) -> Node:
    (cli.root / "volumes").mkdir()  # is there to stay, as the directory of logs is
    return cli


def sh(name: str, script: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "command": ["sh", "-c", script], **more}


def pod(cli: Node, *containers: dict[str, Any], name: str = "web", **spec: Any) -> dict[str, Any]:
    """A pod on the host's network unless told, whose containers have the image of the node."""
    spec = {"hostNetwork": True, "terminationGracePeriodSeconds": 0, **spec, "containers": list(containers)}
    for one in (*spec["containers"], *spec.get("initContainers", ())):
        one["image"] = cli.image
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def file_of(directory: Path, *documents: dict[str, Any]) -> str:
    """JSON is YAML."""
    path = directory / "pod.yaml"
    path.write_text("\n---\n".join(json.dumps(document) for document in documents))
    return str(path)


def state_of(cli: Node, name: str) -> str:
    return str({one["name"]: one["state"] for one in json.loads(said(cli, "pod", "ps", "--format", "json"))}[name])


def test_the_life_of_a_pod(cli: Node, tmp_path: Path) -> None:
    """Init containers first and in their order, a volume between all, a config map as files and variables."""
    (tmp_path / "given").mkdir()
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"level": "7"}}
    shared = [{"name": "shared", "mountPath": "/shared"}]
    mounts = [
        *shared,
        {"name": "settings", "mountPath": "/settings"},
        {"name": "given", "mountPath": "/given", "readOnly": True},
    ]
    env = [{"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "level"}}}]
    script = (
        "cat /shared/order /settings/level; echo; echo $LEVEL; echo no >/settings/level; echo no >/given/x; sleep 1000"
    )
    document = pod(
        cli,
        sh("main", f"{script}; sleep 1000", volumeMounts=mounts, env=env),
        sh("side", "echo side; sleep 1000", volumeMounts=shared),
        initContainers=[
            sh("first", "echo first >>/shared/order", volumeMounts=shared, securityContext={"runAsUser": 1000}),
            sh("second", "echo second >>/shared/order", volumeMounts=shared, securityContext={"runAsUser": 1000}),
        ],
        volumes=[
            {"name": "shared", "emptyDir": {}},
            {"name": "settings", "configMap": {"name": "settings", "defaultMode": 0o400}},
            {"name": "given", "hostPath": {"path": str(tmp_path / "given"), "type": "Directory"}},
        ],
    )
    path = file_of(tmp_path, settings, document)
    id_ = said(cli, "pod", "play", path).strip()
    log = eventually(lambda: (text := said(cli, "logs", "web-main")).count("\n") >= 4 and text, what="the output")
    assert log == "first\nsecond\n7\n7\n"
    assert list((tmp_path / "given").iterdir()) == []
    shown = json.loads(said(cli, "pod", "ps", "--format", "json"))
    assert [(one["id"], one["name"], one["state"]) for one in shown] == [(id_, "web", "running")]
    assert {one["name"] for one in json.loads(said(cli, "ps", "--format", "json"))} == {"web-main", "web-side"}
    volume = next((cli.root / "volumes").glob("*/settings/level"))
    assert volume.stat().st_mode & 0o777 == 0o400 and volume.parents[1].stat().st_mode & 0o777 == 0o700
    taken = ocid(cli, "pod", "play", path)
    assert taken.returncode == 125 and "the name web is taken" in taken.stderr
    refused = ocid(cli, "pod", "rm", "web")
    assert refused.returncode == 1 and "web is running" in refused.stderr
    again = said(cli, "pod", "play", "--replace", path).strip()
    assert again != id_ and len(json.loads(said(cli, "pod", "ps", "--format", "json"))) == 1
    assert said(cli, "pod", "down", path) == "web\n"
    missing = ocid(cli, "pod", "down", path)
    assert missing.returncode == 1 and "there is no pod 'web'" in missing.stderr


def test_what_is_refused_makes_nothing(cli: Node, tmp_path: Path) -> None:
    """Not even the pod before the one that is wrong."""
    wrong = pod(cli, sh("main", "true", livenessProbe={"exec": {}}), name="b")
    done = ocid(cli, "pod", "play", file_of(tmp_path, pod(cli, sh("main", "sleep 1000"), name="a"), wrong))
    assert done.returncode == 125 and "pod b: spec.containers[0].livenessProbe: is not supported" in done.stderr
    assert json.loads(said(cli, "pod", "ps", "--format", "json")) == []


@pytest.mark.parametrize(
    ("containers", "init", "words"),
    [
        ([("main", "sleep 1000")], [("first", "echo why >&2; exit 3")], "init container first ended with 3: why"),
        ([("main", "sleep 1000"), ("bad", "")], [], "nosuch"),
    ],
)
def test_what_cannot_be_started_leaves_nothing(
    cli: Node, tmp_path: Path, containers: list[tuple[str, str]], init: list[tuple[str, str]], words: str
) -> None:
    made = [sh(name, script) if script else {"name": name, "command": ["nosuch"]} for name, script in containers]
    first = [sh(name, script) for name, script in init]
    document = pod(cli, *made, initContainers=first, volumes=[{"name": "v", "emptyDir": {}}])
    done = ocid(cli, "pod", "play", file_of(tmp_path, document))
    assert done.returncode == 125 and words in done.stderr, done.stderr


def test_restart_policies(cli: Node, tmp_path: Path) -> None:
    once = pod(cli, sh("main", "exit 1"), name="once", restartPolicy="Never")
    always = pod(cli, sh("main", "echo up; exec sleep 1000"), name="always")
    path = file_of(tmp_path, once, always)
    said(cli, "pod", "play", path)
    assert said(cli, "wait", "once-main") == "1\n"
    assert state_of(cli, "once") == "exited"
    pid = int(said(cli, "inspect", "--format", "{{.info.pid}}", "always-main"))
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: logged(cli).count("up") == 2, what="the next run")
    assert said(cli, "logs", "always-main") == "up\nup\n"
    assert state_of(cli, "always") == "running"
    assert said(cli, "pod", "rm", "once") == "once\n"
    said(cli, "pod", "rm", "-f", "always")
    wrong = ocid(cli, "pod", "rm", "nosuch", "none")
    assert wrong.returncode == 1 and "'nosuch'" in wrong.stderr and "'none'" in wrong.stderr


def test_limits_rights_and_shared_processes(cli: Node, tmp_path: Path) -> None:
    rights = {
        "runAsUser": 1000,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "Unconfined"},  # or its program would stay in the cache
    }
    script = "id -u; grep -E 'NoNewPrivs|CapBnd' /proc/self/status; touch /x; cat /proc/1/comm; sleep 1000"
    document = pod(
        cli,
        sh("side", "sleep 1000"),
        sh("main", script, securityContext=rights, resources={"limits": {"memory": "32Mi", "cpu": "500m"}}),
        shareProcessNamespace=True,
    )
    said(cli, "pod", "play", file_of(tmp_path, document))
    main = next(one for one in json.loads(said(cli, "ps", "--format", "json")) if one["name"] == "web-main")
    lines = eventually(lambda: len(found := said(cli, "logs", "web-main").split()) >= 6 and found, what="the output")
    assert lines[0] == "1000" and lines[lines.index("NoNewPrivs:") + 1] == "1"
    assert int(lines[lines.index("CapBnd:") + 1], 16) == 0 and lines[-1] == "ocid-pause"
    limits = [int(path.read_text()) for path in CGROUPS.glob(f"memory/{cli.tag}/{main['id']}/memory.limit_in_bytes")]
    limits += [int(path.read_text()) for path in CGROUPS.glob(f"{cli.tag}/{main['id']}/memory.max")]
    assert limits == [32 << 20]
    said(cli, "pod", "rm", "-f", "web")


def test_a_host_port(cli: Node, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = sh("main", "echo hello >/index.html; httpd -f -p 80 -h /", ports=[{"containerPort": 80, "hostPort": port}])
    said(cli, "pod", "play", file_of(tmp_path, pod(cli, served, hostNetwork=False)))

    def answer() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), COMMAND_S) as peer:
                peer.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
                return peer.recv(16).startswith(b"HTTP/1")
        except OSError:
            return False

    eventually(answer, what="an answer on the host's port")
    said(cli, "pod", "rm", "-f", "web")
