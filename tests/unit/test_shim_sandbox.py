"""Names and numbers that come from outside: sysctls (S59), ids (S19)."""

from __future__ import annotations

import pytest

from runtime.errors import RuntimeFailure
from runtime.shim.records import check_id, runtime_root
from runtime.shim.sandbox import sysctl_path


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/ip_forward", "net/ipv4/ip_forward"),
        ("net.ipv4.conf.eth0/100.forwarding", "net/ipv4/conf/eth0.100/forwarding"),
        ("net/ipv4/conf/eth0.100/forwarding", "net/ipv4/conf/eth0.100/forwarding"),
        ("kernel.shmmax", "kernel/shmmax"),
        ("kernel.sem", "kernel/sem"),
        ("fs.mqueue.msg_max", "fs/mqueue/msg_max"),
    ],
)
def test_sysctls_of_the_pods_own_namespaces(key: str, path: str) -> None:
    assert sysctl_path(key, private_ipc=True, private_net=True) == path


@pytest.mark.parametrize(
    "key",
    [
        "kernel.core_pattern",
        "vm.swappiness",
        "kernel.hostname",
        "fs.file-max",
        "net",
        "",
        ".",
        "net..ipv4",
        "net/../kernel",
        "net.ipv4.x;y",
        "net.ipv4.x y",
        "net.ipv4.x=1+kernel.core_pattern",
        "net.ipv4.x\nkernel.y",
        "/net/ipv4/x",
        "net/",
        "fs.mqueue",
        "net.ipv4.\udc80",
    ],
)
def test_s59_other_sysctls_are_refused(key: str) -> None:
    with pytest.raises(RuntimeFailure, match="sysctl") as caught:
        sysctl_path(key, private_ipc=True, private_net=True)
    assert caught.value.code == "invalid_argument"


def test_s59_sysctls_of_namespaces_that_are_the_hosts_are_refused() -> None:
    with pytest.raises(RuntimeFailure, match="namespace"):
        sysctl_path("net.ipv4.ip_forward", private_ipc=True, private_net=False)
    with pytest.raises(RuntimeFailure, match="namespace"):
        sysctl_path("kernel.shmmax", private_ipc=False, private_net=True)


@pytest.mark.parametrize("name", ["..", ".", "a/b", "-x", "", "x" * 4096, "a\0b", "a\nb", "a b", "é", "../a", "+x"])
def test_s19_ids_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(RuntimeFailure, match="no container id"):
        check_id(name)
    check_id("0123456789abcdef_A.b-c+d")


def test_every_handler_has_a_state_directory_of_its_own() -> None:
    roots = {runtime_root("/run/ocid", handler) for handler in ("", "/usr/sbin/runc", "/opt/runc", "/usr/bin/crun")}
    assert len(roots) == 4
    assert runtime_root("/run/ocid", "") == "/run/ocid/runtime"
