"""What a killed criu leaves, made by hand: its locks on a network, of both kinds, and connections in repair mode."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from runtime import criu_leftovers
from runtime.linux.process import CLONE_NEWNET, setns
from tests.support import SOON_S, needs

REPAIR = 19  # TCP_REPAIR of linux/tcp.h


@pytest.fixture
def network() -> Iterator[str]:
    """A network of somebody else's."""
    needs("root")
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up; echo; exec sleep 1000"], stdout=-1)
    assert holder.stdout is not None
    holder.stdout.readline()
    yield f"/proc/{holder.pid}/ns/net"
    holder.stdout.close()
    holder.kill()
    holder.wait()


def inside(network: str, *words: str) -> str:
    return subprocess.run(
        ["nsenter", f"--net={network}", *words], capture_output=True, text=True, timeout=SOON_S, check=True
    ).stdout


def rules(network: str) -> list[str]:
    lines = [inside(network, program, "-S") for program in ("iptables", "ip6tables")]
    return [line for text in lines for line in text.splitlines()]


def lock(network: str, times: int = 1) -> None:
    for program in ("iptables", "ip6tables"):
        inside(network, program, "-N", "CRIU")
        for chain in ("INPUT", "OUTPUT"):
            for _ in range(times):
                inside(network, program, "-I", chain, "-j", "CRIU")
        inside(network, program, "-A", "CRIU", "-m", "mark", "--mark", "0xC114", "-j", "ACCEPT")
        inside(network, program, "-A", "CRIU", "-j", "DROP")


def test_a_lock_of_iptables_is_taken_away_and_nothing_else(network: str) -> None:
    for program in ("iptables", "ip6tables"):
        inside(network, program, "-N", "MINE")
        inside(network, program, "-A", "INPUT", "-j", "MINE")
        inside(network, program, "-A", "INPUT", "-m", "mark", "--mark", "0xC114", "-j", "DROP")
    before = rules(network)
    lock(network, times=2)  # of two dumps, the first of which nobody has cleaned up after
    assert rules(network) != before
    criu_leftovers.unlock(network)
    assert rules(network) == before
    criu_leftovers.unlock(network)
    assert rules(network) == before


def test_a_lock_of_nft_is_taken_away_and_nothing_else(network: str) -> None:
    inside(network, "nft", "add", "table", "inet", "mine")
    inside(network, "nft", "add", "table", "ip", "CRIU-12")  # not where criu has its own
    before = inside(network, "nft", "list", "ruleset")
    for name in ("CRIU-1234", "CRIU-0a1b2c"):
        inside(
            network,
            "nft",
            f"add table inet {name}; add chain inet {name} out {{ type filter hook output priority 0; policy drop; }}",
        )
    criu_leftovers.unlock(network)
    assert inside(network, "nft", "list", "ruleset") == before


def test_our_own_network_is_let_alone_and_one_that_is_gone_is_fine(network: str) -> None:
    lock(network)
    locked = rules(network)
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open(network, os.O_RDONLY)
            setns(fd, CLONE_NEWNET)
            criu_leftovers.unlock("/proc/self/ns/net")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert rules(network) == locked
    criu_leftovers.unlock("/proc/self/ns/none")


def test_connections_in_repair_mode_live_again() -> None:
    """Those of a process of its own, which stands still until they are mended, then says what comes over its own."""
    needs("root")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as near:
        near.connect(server.getsockname())
        far, _ = server.accept()
        with far:
            told, tell = os.pipe()
            still, go = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    server.close()
                    near.close()
                    os.close(go)
                    os.read(still, 1)
                    os.write(tell, far.recv(100))
                except OSError as error:
                    os.write(tell, str(error).encode())
                finally:
                    os._exit(0)
            os.close(tell)
            os.close(still)
            try:
                near.setsockopt(socket.IPPROTO_TCP, REPAIR, 1)
                far.setsockopt(socket.IPPROTO_TCP, REPAIR, 1)
                with pytest.raises(PermissionError):
                    far.recv(1)
                criu_leftovers.mend_connections([pid, os.getpid(), 1 << 30])
                assert [one.getsockopt(socket.IPPROTO_TCP, REPAIR) for one in (near, far)] == [0, 0]
                os.close(go)
                go = -1
                near.sendall(b"over the wire")
                assert os.read(told, 100) == b"over the wire"
            finally:
                if go >= 0:
                    os.close(go)
                os.close(told)
                os.waitpid(pid, 0)
