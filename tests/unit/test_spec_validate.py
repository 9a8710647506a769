"""cri.spec.validate and cri.spec.etc: what must never become a path, a sysctl or a line."""

from __future__ import annotations

import pytest

from cri.spec import etc, validate
from cri.spec.validate import InvalidRequest


@pytest.mark.parametrize("value", ["../x", "a/b", "/abs", "", "a\nb", "a\0b", "-x", ".", "..", "x" * 300, "ä"])
def test_s57_names_never_carry_a_path(value: str) -> None:
    with pytest.raises(InvalidRequest):
        validate.name("metadata.name", value)
    with pytest.raises(InvalidRequest):
        validate.uid("metadata.uid", value)


@pytest.mark.parametrize("value", ["/abs", "a/../../b", "..", "a\0", "a\nb"])
def test_s57_log_paths_stay_below_the_log_directory(value: str) -> None:
    with pytest.raises(InvalidRequest):
        validate.log_path(value)


@pytest.mark.parametrize("value", ["relative", "/a/../b", "/a\0"])
def test_s57_log_directories_are_absolute(value: str) -> None:
    with pytest.raises(InvalidRequest):
        validate.log_directory(value)


def test_good_names_pass() -> None:
    assert validate.name("n", "web-0.frontend") == "web-0.frontend"
    assert validate.log_path("web/0.log") == "web/0.log"
    assert validate.hostname("") == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kernel.core_pattern", "x"),
        ("vm.swappiness", "1"),
        ("net.ipv4.ip_forward", "1+kernel.core_pattern=|x"),
        ("net.ipv4.ip_forward", "1\nkernel.core_pattern=x"),
        ("net.ipv4.ip_forward", "1;x"),
        ("net.ipv4.ip_forward", "1='"),
        ("net/../kernel/core_pattern", "x"),
        ("net..ipv4", "1"),
        ("net.ipv4=1", "1"),
        ("kernel.shm_rmid_forced/../core_pattern", "x"),
        ("fs.file-max", "1"),
        ("", "1"),
    ],
)
def test_s59_only_namespaced_sysctls_pass(key: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match="sysctls"):
        validate.sysctls({key: value}, private_network=True, private_ipc=True)


def test_s59_not_with_the_hosts_namespaces() -> None:
    with pytest.raises(InvalidRequest, match="network"):
        validate.sysctls({"net.core.somaxconn": "1"}, private_network=False, private_ipc=True)
    with pytest.raises(InvalidRequest, match="IPC"):
        validate.sysctls({"kernel.shmmax": "1"}, private_network=True, private_ipc=False)


def test_sysctl_names_with_either_separator() -> None:
    asked = {"net/ipv4/conf/eth0.1/forwarding": "1", "kernel.shmmax": "65536", "fs.mqueue.msg_max": "10"}
    assert validate.sysctls(asked, private_network=True, private_ipc=True) == {
        "net.ipv4.conf.eth0/1.forwarding": "1",
        "kernel.shmmax": "65536",
        "fs.mqueue.msg_max": "10",
    }


def test_resolv_conf_is_made_of_checked_words() -> None:
    text = etc.resolv_conf(["10.0.0.10", "fe80::1%eth0"], ["a.svc", "."], ["ndots:5"])
    assert text == "search a.svc .\nnameserver 10.0.0.10\nnameserver fe80::1%eth0\noptions ndots:5\n"
    for bad in ([["1.2.3.4\noptions x"], [], []], [[], ["a b"], []], [[], [], ["x\ny"]], [["not-an-address"], [], []]):
        with pytest.raises(InvalidRequest, match="dns_config"):
            etc.resolv_conf(*bad)


def test_hosts_names_the_pod() -> None:
    assert etc.hosts("web-0", ["10.88.0.2", "fd00::2"]).splitlines()[-2:] == ["10.88.0.2\tweb-0", "fd00::2\tweb-0"]
