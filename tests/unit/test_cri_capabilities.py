"""What CNI plugins are told of a pod when they ask for it."""

from __future__ import annotations

import pytest

from cri.api import api_pb2 as pb
from cri.capabilities import capabilities
from cri.errors import InvalidArgument


def test_a_pod_without_any_tells_nothing() -> None:
    assert capabilities(pb.PodSandboxConfig()) == {}


def test_all_that_there_is() -> None:
    config = pb.PodSandboxConfig(annotations={"kubernetes.io/ingress-bandwidth": "1.5M", "a": "b"})
    config.dns_config.servers.append("192.0.2.53")
    config.linux.cgroup_parent = "/kubepods/pod1"
    assert capabilities(config) == {
        "dns": {"servers": ["192.0.2.53"], "searches": [], "options": []},
        "bandwidth": {"ingressRate": 1500000, "ingressBurst": 4294967295},
        "cgroupPath": "/kubepods/pod1",
        "io.kubernetes.cri.pod-annotations": {"kubernetes.io/ingress-bandwidth": "1.5M", "a": "b"},
    }


@pytest.mark.parametrize("text, bits", [("1k", 1000), ("10Mi", 10485760), ("1P", 10**15), ("2000", 2000)])
def test_quantities(text: str, bits: int) -> None:
    config = pb.PodSandboxConfig(annotations={"kubernetes.io/egress-bandwidth": text})
    assert capabilities(config)["bandwidth"] == {"egressRate": bits, "egressBurst": 4294967295}


@pytest.mark.parametrize("text", ["1", "-5M", "1M5", "2P", "ten", "1e6", "9" * 40, "1.M"])
def test_r06_what_is_no_bandwidth_is_named(text: str) -> None:
    config = pb.PodSandboxConfig(annotations={"kubernetes.io/egress-bandwidth": text})
    with pytest.raises(InvalidArgument, match=r"kubernetes.io/egress-bandwidth: expected bits per second"):
        capabilities(config)
