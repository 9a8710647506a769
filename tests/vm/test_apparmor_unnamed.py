"""Containers that name no AppArmor profile, over the CRI and without a daemon: they have the default one, as with the
peers, unless they are privileged or say Unconfined.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.cri_client import container
from cri.api import api_pb2 as pb
from cri.apparmor import PROFILE
from cri.spec.confine import APPARMOR_DEFAULT
from tests.e2e import Node, messages, node
from tests.fakes.registry import FakeRegistry
from tests.support import eventually
from tests.vm.images import busybox

LABEL = "/proc/self/attr/current"
ENFORCED = f"{APPARMOR_DEFAULT} (enforce)"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with FakeRegistry() as registry, node(tmp_path_factory.mktemp("n")) as made:
        registry.add("busybox", "1", busybox())
        made.image = f"{registry.name}/busybox:1"
        made.client.pull(made.image)
        yield made
    subprocess.run(["apparmor_parser", "--remove"], input=PROFILE, text=True, check=True)


def _label(bench: Node, **context: Any) -> str:
    """What a container with this security context says of itself, and the same of a command that it is given."""
    config = bench.pod_config()
    config.linux.security_context.privileged = context.get("privileged", False)
    pod = bench.client.run_pod(config)
    one = container("one", bench.image, ["sh", "-c", f"cat {LABEL}; sleep 1000"])
    one.linux.security_context.MergeFrom(pb.LinuxContainerSecurityContext(**context))
    id_ = bench.client.create(pod, one, config)
    bench.client.start(id_)
    said = eventually(lambda: messages(Path(config.log_directory) / "one.log"), what="the container's word")[0]
    assert bench.client.exec_sync(id_, ["cat", LABEL])[1].decode().strip() == said
    bench.drop(pod)
    return said


def test_who_names_none_has_the_default_one(bench: Node) -> None:
    assert _label(bench) == ENFORCED


@pytest.mark.parametrize(
    "context", [{"privileged": True}, {"apparmor": pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)}]
)
def test_who_is_privileged_or_unconfined_has_none(bench: Node, context: dict[str, Any]) -> None:
    assert _label(bench, **context) == "unconfined"


def test_without_a_daemon_it_is_the_same(bench: Node) -> None:
    bench.end()
    subprocess.run(["apparmor_parser", "--remove"], input=PROFILE, text=True, check=True)
    try:
        for flags, label in (((), ENFORCED), (("--privileged",), "unconfined")):
            words = [*bench.words, "run", "--rm", "--net=none", *flags, bench.image, "cat", LABEL]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout.strip()) == (0, label), done.stderr
    finally:
        bench.start()
