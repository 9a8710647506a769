"""Pod files: what is understood, and that everything else is refused by its path."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from cri.api import api_pb2 as pb
from cri.podfile.documents import MAX_BYTES, documents
from cri.podfile.pod import PlannedPod, names, pods
from cri.podfile.values import expand, quantity
from runtime.fields import FieldError, Fields


def pod(container: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """A Pod document with one container."""
    one = {"name": "main", "image": "busybox", **(container or {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": {"containers": [one], **spec}}


def config_map(name: str = "settings", **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def understood(*found: dict[str, Any]) -> list[PlannedPod]:
    raw = yaml.safe_dump_all(found).encode()
    return pods(raw, "file.yaml", lambda uid: (Path("/logs", uid), Path("/volumes", uid)))


def one(*found: dict[str, Any]) -> pb.ContainerConfig:
    """The config of the only container."""
    return understood(*found)[0].containers[0].config


def refused(*found: dict[str, Any]) -> str:
    with pytest.raises(FieldError) as error:
        understood(*found)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("500m", Fraction(1, 2)),
        ("1.5", Fraction(3, 2)),
        ("64Mi", Fraction(64 << 20)),
        ("2G", Fraction(2 * 10**9)),
        ("1e3", Fraction(1000)),
        (".5Ki", Fraction(512)),
        (2, Fraction(2)),
    ],
)
def test_quantities(text: Any, amount: Fraction) -> None:
    assert quantity(Fields({"a": text}), "a") == amount


@pytest.mark.parametrize("text", ["", "m", "1x", "-1", "1 Mi", "1e", True, "9" * 19, "1" * 18 + "Ei", "\u0661"])
def test_what_is_no_quantity(text: Any) -> None:
    with pytest.raises(FieldError, match="^a: "):
        quantity(Fields({"a": text}), "a")


def test_references_to_variables() -> None:
    assert expand("$(A)-$(B)-$$(A)-$A", {"A": "1"}) == "1-$(B)-$(A)-$A"


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"a: 1\na: 2\n", "key 'a' twice"),
        (b"a: &x [1]\nb: *x\n", "aliases are refused"),
        (b"a: !!python/object:os.system {}\n", "could not determine a constructor"),
        (b"1: a\n", "is no text"),
        (b"a: !!binary aGVsbG8=\n", "a bytes is no value"),
        (b"a: {\n", "line 2"),
        (b"a: \xff\n", "no valid YAML"),
        (b"[" * 600, "nested too deeply"),
        (b"x" * (MAX_BYTES + 1), "at most"),
        (b"---\na: 1\n" * 101, "more than 100 documents"),
    ],
)
def test_text_that_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(FieldError, match=why):
        documents(raw, "file.yaml")


def test_a_date_is_text() -> None:
    assert documents(b"a: 2026-01-01\n", "f") == [{"a": "2026-01-01"}]


def test_what_generators_write_without_meaning_it() -> None:
    document = pod({"resources": {}, "livenessProbe": None, "terminationMessagePath": ""}, nodeName="", tolerations=[])
    document["metadata"]["creationTimestamp"] = None
    document["status"] = {}
    assert understood(document)[0].name == "web"


@pytest.mark.parametrize(
    ("document", "path"),
    [
        (pod({"livenessProbe": {"exec": {}}}), "pod web: spec.containers[0].livenessProbe: is not supported"),
        (pod(nodeName="a"), "pod web: spec.nodeName: is not supported"),
        (pod(hostUsers=False), "pod web: spec.hostUsers: false"),
        (pod(securityContext={"fsGroup": 0}), "pod web: spec.securityContext.fsGroup: is not"),
        (pod({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]}), "env[0].valueFrom.secretKeyRef"),
        (pod({"env": [{"name": "A", "value": 1}]}), "spec.containers[0].env[0].value: expected string, got 1"),
        (pod(volumes=[{"name": "v", "emptyDir": {"medium": "Memory"}}]), "spec.volumes[0].emptyDir.medium"),
        (pod(volumes=[{"name": "v", "secret": {"secretName": "s"}}]), "spec.volumes[0].secret: is not supported"),
        (pod(volumes=[{"name": "v"}]), "spec.volumes[0]: expected one of emptyDir"),
        (pod(volumes=[{"name": "v", "configMap": {"name": "no"}}]), "there is no ConfigMap 'no'"),
        (pod({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}), "volumeMounts[0].name: the pod has no volume 'v'"),
        (pod({"resources": {"limits": {"nvidia.com/gpu": 1}}}), "resources.limits.nvidia.com/gpu"),
        (pod({"resources": {"limits": {"cpu": 1}, "requests": {"cpu": 2}}}), "requests.cpu: is more than its limit"),
        (pod({"securityContext": {"runAsNonRoot": True}}), "securityContext.runAsNonRoot: needs a runAsUser"),
        (pod({"securityContext": {"procMount": "Unmasked"}}), "securityContext.procMount: is not supported"),
        (pod({"image": ""}), "spec.containers[0].image: is required"),
        (pod({"ports": [{"containerPort": 80, "hostPort": 80}]}, hostNetwork=True), "spec.hostNetwork: "),
        (pod(restartPolicy="Sometimes"), "spec.restartPolicy: expected one of"),
        (pod(initContainers=[{"name": "main", "image": "a"}]), "'main' is there already"),
        (
            pod(initContainers=[{"name": "a", "image": "a", "restartPolicy": "Always"}]),
            "spec.initContainers[0].restart",
        ),
        (
            {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}},
            "document 1: expected v1 Pod or Con",
        ),
        (config_map(), "there is no Pod in it"),
    ],
)
def test_what_is_refused_by_its_path(document: dict[str, Any], path: str) -> None:
    assert path in refused(document)


def test_a_path_out_of_a_config_map() -> None:
    items = [{"key": "a", "path": "../../etc/x"}]
    document = pod(volumes=[{"name": "v", "configMap": {"name": "settings", "items": items}}])
    assert "items[0].path" in refused(config_map(a="1"), document)


def test_variables_of_a_container_and_words_with_them() -> None:
    env = [
        {"name": "A", "value": "one"},
        {"name": "B", "value": "$(A) two"},
        {"name": "C", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "level"}}},
        {"name": "D", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "no", "optional": True}}},
    ]
    container = {
        "env": env,
        "envFrom": [{"prefix": "S_", "configMapRef": {"name": "settings"}}],
        "args": ["$(B)", "$(X)"],
    }
    config = one(config_map(level="3"), pod(container))
    assert {pair.key: pair.value for pair in config.envs} == {"S_level": b"3", "A": b"one", "B": b"one two", "C": b"3"}
    assert list(config.args) == ["one two", "$(X)"]


def test_limits_and_shares() -> None:
    wanted = {"limits": {"cpu": "500m", "memory": "64Mi"}, "requests": {"cpu": "250m", "memory": "32Mi"}}
    resources = one(pod({"resources": wanted})).linux.resources
    assert (resources.cpu_period, resources.cpu_quota, resources.cpu_shares) == (100_000, 50_000, 256)
    assert resources.memory_limit_in_bytes == resources.memory_swap_limit_in_bytes == 64 << 20


def test_rights_of_the_pod_hold_where_a_container_says_nothing() -> None:
    wide = {
        "runAsUser": 1000,
        "runAsNonRoot": True,
        "supplementalGroups": [7],
        "seccompProfile": {"type": "Unconfined"},
    }
    plain = one(pod(securityContext=wide)).linux.security_context
    assert (plain.run_as_user.value, list(plain.supplemental_groups)) == (1000, [7])
    assert plain.seccomp.profile_type == pb.SecurityProfile.Unconfined
    own = {"runAsUser": 5, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    strict = one(pod({"securityContext": own}, securityContext=wide)).linux.security_context
    assert (strict.run_as_user.value, strict.no_new_privs) == (5, True)
    assert list(strict.capabilities.drop_capabilities) == ["ALL"]
    assert one(pod()).linux.security_context.seccomp.profile_type == pb.SecurityProfile.RuntimeDefault
    root = one(pod({"securityContext": {"runAsUser": 0}}, securityContext={"runAsUser": 5})).linux.security_context
    assert root.HasField("run_as_user") and root.run_as_user.value == 0


@pytest.mark.parametrize(
    ("spec", "policy"),
    [({}, "always"), ({"restartPolicy": "OnFailure"}, "on-failure"), ({"restartPolicy": "Never"}, "")],
)
def test_restart_policies_are_not_for_init_containers(spec: dict[str, str], policy: str) -> None:
    planned = understood(pod(initContainers=[{"name": "first", "image": "a"}], **spec))[0]
    assert planned.containers[0].config.annotations["ocid.restart"] == policy
    assert "ocid.restart" not in planned.init[0].config.annotations


def test_namespaces() -> None:
    def of(**spec: Any) -> tuple[int, int, int]:
        options = understood(pod(**spec))[0].config.linux.security_context.namespace_options
        return options.pid, options.network, options.ipc

    assert of() == (pb.CONTAINER, pb.POD, pb.POD)
    assert of(shareProcessNamespace=True)[0] == pb.POD
    assert of(hostPID=True, hostNetwork=True, hostIPC=True) == (pb.NODE, pb.NODE, pb.NODE)


def test_names_are_read_of_files_that_cannot_be_played() -> None:
    raw = yaml.safe_dump_all([config_map(), pod({"livenessProbe": {"exec": {}}})]).encode()
    assert names(raw, "f") == ["web"]
