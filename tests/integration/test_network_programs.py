"""Plugins that are programs: the reference ones in a chain with ours, and ones that hang, lie, flood and die."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from grpc import StatusCode

from cri.errors import code_of
from cri.interfaces import NetworkError, PodNetwork, PortMapping
from runtime.linux.process import start_time
from tests.costs import soon
from tests.fakes.network import (
    Corner,
    connect,
    in_pod,
    isolated,
    listen,
    make_pod,
    network_corner,
    no_ports_left,
    pod_id,
    reaches,
    refused,
    remove_pod,
    running_pod,
)
from tests.support import SOON_S, eventually, needs

REFERENCE = Path("/usr/lib/cni")
# Writes down every call, answers with what came before, or with an address.
SPY = """
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME" >> "$0.calls"
cat > "$0.$CNI_COMMAND.stdin"
env > "$0.$CNI_COMMAND.env"
"""
ANSWER = """echo '{"cniVersion":"1.0.0","ips":[{"address":"192.0.2.77/24"}]}'"""


@pytest.fixture
def corner(tmp_path: Path) -> Iterator[Corner]:
    needs("root", "nftables")
    with network_corner(tmp_path) as found:
        yield found


def _calls(corner: Corner, name: str = "spy") -> list[str]:
    path = corner.config.bin_dirs[0] / f"{name}.calls"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def _failure(corner: Corner, script: str, code: StatusCode = StatusCode.UNKNOWN) -> str:
    """The sentence of an add whose only plugin is `script`, which fails with `code`; the pod is gone afterwards and DEL
    was called."""
    corner.program("bad", f'echo "$CNI_COMMAND" >> "$0.calls"\nif [ "$CNI_COMMAND" = ADD ]; then\n{script}\nfi')
    corner.conflist("net", [{"type": "bad"}])

    async def scenario() -> str:
        pod = await make_pod(corner)
        with soon(), pytest.raises(NetworkError) as caught:
            await corner.cni.add(pod)
        assert _calls(corner, "bad") == ["ADD", "DEL"]
        assert not list(corner.records.glob(f"{pod.id}*"))
        await remove_pod(corner, pod)
        assert code_of(caught.value) is code
        return str(caught.value)

    sentence = asyncio.run(scenario())
    assert sentence.startswith("network net: plugin bad: add pod default/web") and len(sentence) < 4000
    assert "\n" not in sentence
    return sentence


def test_environment_and_stdin_are_as_the_specification_says(corner: Corner) -> None:
    spy = corner.program("spy", SPY + ANSWER)
    settings = {"type": "spy", "colour": "blue", "capabilities": {"portMappings": True, "bandwidth": True}}
    corner.conflist("net", [settings])
    ports = (PortMapping(8080, 80), PortMapping(5353, 53, "udp", "127.0.0.1"))

    async def scenario() -> None:
        async with running_pod(corner, ports=ports) as (pod, result):
            assert result.ips == ("192.0.2.77",)
            seen = dict(line.split("=", 1) for line in Path(f"{spy}.ADD.env").read_text().splitlines() if "=" in line)
            assert seen["CNI_COMMAND"] == "ADD" and seen["CNI_CONTAINERID"] == pod.id and seen["CNI_IFNAME"] == "eth0"
            assert seen["CNI_NETNS"] == str(pod.netns) and seen["CNI_PATH"] == f"{spy.parent}:{REFERENCE}"
            assert seen["CNI_ARGS"] == (
                f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;"
                f"K8S_POD_INFRA_CONTAINER_ID={pod.id};K8S_POD_UID=u-1"
            )
            given = json.loads(Path(f"{spy}.ADD.stdin").read_text())
            assert given["name"] == "net" and given["cniVersion"] == "1.0.0" and given["colour"] == "blue"
            assert "prevResult" not in given
            assert given["runtimeConfig"]["portMappings"] == [
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
                {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
            ]
        given = json.loads(Path(f"{spy}.DEL.stdin").read_text())
        assert given["prevResult"]["ips"][0]["address"] == "192.0.2.77/24"
        assert _calls(corner) == ["ADD", "DEL"]

    asyncio.run(scenario())


def test_a_chain_of_native_bridge_and_reference_tuning(corner: Corner) -> None:
    tuning = {"type": "tuning", "sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"}, "mac": "02:11:22:33:44:55"}
    corner.conflist("net", [corner.bridge_plugin(), tuning])

    def look() -> tuple[str, str]:
        # sysfs shows the namespace it was mounted in; procfs the one of the thread.
        shown = subprocess.run(["ip", "-j", "link", "show", "eth0"], capture_output=True, check=True)
        return Path("/proc/sys/net/ipv4/conf/eth0/arp_filter").read_text(), json.loads(shown.stdout)[0]["address"]

    async def scenario() -> None:
        async with running_pod(corner) as (pod, result):
            assert in_pod(pod, look) == ("1\n", "02:11:22:33:44:55")
            assert reaches(None, pod, result.ips[0])
        assert corner.leased("net") == {}
        no_ports_left(corner)

    asyncio.run(scenario())


def test_reference_bridge_and_native_bridge_share_network_and_leases(corner: Corner) -> None:
    """An option that only the program has sends the call there; both see each other's leases."""
    native = corner.bridge_plugin(ipMasq=False)
    data = {**native["ipam"], "dataDir": str(corner.config.lease_dir)}  # type: ignore[dict-item]
    corner.conflist("net", [{**native, "ipam": data}], file="10-net.conflist")

    async def scenario() -> None:
        async with running_pod(corner) as (one, first):
            corner.conflist("net", [{**native, "ipam": data, "macspoofchk": False, "args": {"cni": {}}}])
            async with running_pod(corner) as (two, second):
                assert int(ipaddress.ip_address(second.ips[0])) == int(ipaddress.ip_address(first.ips[0])) + 1
                assert reaches(one, two, second.ips[0]) == first.ips[0]
                assert corner.leased("net") == {first.ips[0]: one.id, second.ips[0]: two.id}
                assert (corner.config.lease_dir / "net" / second.ips[0]).read_bytes() == f"{two.id}\r\neth0".encode()
                assert (corner.config.lease_dir / "net" / first.ips[0]).read_bytes() == f"{one.id}\r\neth0".encode()
            assert corner.leased("net") == {first.ips[0]: one.id}
        assert corner.leased("net") == {}

    asyncio.run(scenario())


def test_native_bridge_with_an_ipam_program(corner: Corner) -> None:
    base = corner.subnet.rsplit(".", 1)[0]
    ipam = {"type": "static", "addresses": [{"address": f"{base}.9/24", "gateway": f"{base}.1"}]}
    corner.conflist("net", [corner.bridge_plugin(ipam=ipam)])

    async def scenario() -> None:
        async with running_pod(corner) as (pod, result):
            assert result.ips == (f"{base}.9",) and reaches(pod, None, f"{base}.1") == f"{base}.9"
        corner.conflist("net", [corner.bridge_plugin(ipam={"type": "nosuch"})])
        pod = await make_pod(corner)
        with refused("plugin bridge.*ipam nosuch: no program nosuch in", StatusCode.FAILED_PRECONDITION):
            await corner.cni.add(pod)
        await corner.cni.remove_netns(pod.netns)

    asyncio.run(scenario())


def test_an_option_only_a_program_has_is_named_when_the_program_is_missing(tmp_path: Path) -> None:
    needs("root")
    with network_corner(tmp_path, bin_dirs=(tmp_path / "bin",)) as corner:
        corner.conflist("net", [corner.bridge_plugin(vlan=100)])

        async def scenario() -> None:
            reason = await corner.cni.status()
            assert reason is not None and "option vlan is not done in-process" in reason
            pod = await make_pod(corner)
            with refused(
                "plugin bridge: .*option vlan is not done in-process, and no prog", StatusCode.FAILED_PRECONDITION
            ):
                await corner.cni.add(pod)
            await corner.cni.remove_netns(pod.netns)
            assert not corner.records.exists()  # no DEL could undo an ADD that cannot be

        asyncio.run(scenario())


# ------------------------------------------------------------------------------------------ plugins that misbehave


def test_a_plugin_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    needs("root")
    with network_corner(tmp_path, plugin_timeout_s=1.0) as corner:
        said = _failure(
            corner, 'echo working >&2; sleep 1000 & echo $! > "$0.child"; wait', StatusCode.DEADLINE_EXCEEDED
        )
        assert "no end after 1 s, killed; it said: working" in said
        child = int((corner.config.bin_dirs[0] / "bad.child").read_text())

        def gone() -> bool:
            try:
                start_time(child)
            except ProcessLookupError:
                return True
            return Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"

        eventually(gone, what="the plugin's child lives on")


def test_r05_a_plugin_that_prints_without_end_is_stopped(corner: Corner) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "printed more than 1048576 bytes, killed" in _failure(corner, "cat /dev/zero")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


def test_r05_a_flood_on_stderr_is_dropped(corner: Corner) -> None:
    said = _failure(corner, "head -c 50000000 /dev/zero | tr '\\0' x >&2; exit 3")
    assert "exit code 3; it said: xxxxxxxx" in said and len(said) < 1500


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 0", "printed no result"),
        ("echo hello", "no valid result: its result: not JSON"),
        ("""printf '{"cniVersion":"1.0.0",}'""", "not JSON"),
        ("echo '[]'", "expected an object"),
        ("echo '{}'", "cniVersion: '' is none of"),
        ("""echo '{"cniVersion":"9.9.9"}'""", "cniVersion: '9.9.9' is none of"),
        ("""echo '{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1"}]}'""", "has no prefix length"),
        ("""echo '{"cniVersion":"1.0.0","ips":[{"address":"300.0.0.1/8"}]}'""", "ips[0]: "),
        ("""echo '{"cniVersion":"1.0.0","ips":{"address":1}}'""", "ips: expected a list"),
        ("""echo '{"cniVersion":"1.0.0","ips":[7]}'""", "ips[0]: expected an object"),
        ("""echo '{"cniVersion":"1.0.0","cniVersion":"0.4.0"}'""", "occurs twice"),
        ("head -c 200000 /dev/zero | tr '\\0' '['", "nested too deeply"),
        ("""echo '{"cniVersion":"1.0.0","code":7,"msg":"no"}'""", "ended well and printed an error: no"),
        ("""echo '{"cniVersion":"1.0.0","code":7,"msg":"no room","details":"a b"}'; exit 1""", "no room: a b (code 7)"),
        ("""printf '{"cniVersion":"1.0.0","code":7,"msg":"x\\\\u001b[31m\\\\ny"}'; exit 1""", "x [31m y (code 7)"),
        ("echo oh >&2; exit 9", "exit code 9; it said: oh"),
        ("kill -SEGV $$", "killed by signal 11"),
    ],
)
def test_a_plugin_that_lies_is_named(corner: Corner, script: str, words: str) -> None:
    assert words in _failure(corner, script)


@pytest.mark.parametrize("code", [11, 50, 51])
def test_a_plugin_that_asks_for_another_try_is_unavailable(corner: Corner, code: int) -> None:
    script = f"""echo '{{"cniVersion":"1.0.0","code":{code},"msg":"not now"}}'; exit 1"""
    assert f"not now (code {code})" in _failure(corner, script, StatusCode.UNAVAILABLE)


def test_a_program_that_cannot_start_is_named(corner: Corner) -> None:
    corner.program("bad", "").write_bytes(b"\x7fELF garbage")
    corner.conflist("net", [{"type": "bad"}])

    async def scenario() -> None:
        pod = await make_pod(corner)
        with pytest.raises(NetworkError, match="plugin bad: add pod .*start /.*/bad") as caught:
            await corner.cni.add(pod)
        assert code_of(caught.value) is StatusCode.FAILED_PRECONDITION
        assert "it is tried again" in caught.value.__notes__[0]  # DEL cannot start either: the record stays
        corner.program("bad", "exit 0")
        await remove_pod(corner, pod)
        assert not list(corner.records.iterdir())

    asyncio.run(scenario())


@pytest.mark.parametrize("field", ["name", "namespace", "uid"])
def test_pod_names_cannot_add_arguments(corner: Corner, field: str) -> None:
    corner.program("spy", SPY + ANSWER)
    corner.conflist("net", [{"type": "spy"}])

    async def scenario() -> None:
        pod = await make_pod(corner)
        with refused("K8S_POD.*a character that CNI_ARGS cannot", StatusCode.INVALID_ARGUMENT):
            await corner.cni.add(replace(pod, **{field: "x;IP=1.2.3.4"}))
        assert _calls(corner) == []
        for path in corner.records.iterdir():
            path.unlink()
        await corner.cni.remove_netns(pod.netns)

    asyncio.run(scenario())


# --------------------------------------------------------------------------------------------------- failing teardown


def test_a_failing_add_undoes_the_plugins_before_it(corner: Corner) -> None:
    corner.program("bad", 'test "$CNI_COMMAND" != ADD')
    corner.conflist("net", [corner.bridge_plugin(), {"type": "bad"}])

    async def scenario() -> None:
        pod = await make_pod(corner)
        with pytest.raises(NetworkError, match="plugin bad: add pod"):
            await corner.cni.add(pod)
        assert corner.leased("net") == {} and not list(corner.records.iterdir())
        no_ports_left(corner)
        await remove_pod(corner, pod)

    asyncio.run(scenario())


def test_o1_a_cancelled_add_leaves_nothing(corner: Corner) -> None:
    corner.program("slow", 'test "$CNI_COMMAND" = DEL || { echo > "$0.began"; sleep 1000; }')
    corner.conflist("net", [corner.bridge_plugin(), {"type": "slow"}])

    async def one() -> None:
        pod = await make_pod(corner)
        began = corner.config.bin_dirs[0] / "slow.began"
        task = asyncio.create_task(corner.cni.add(pod))
        while not began.exists():
            await asyncio.sleep(0.002)
        began.unlink()
        assert len(corner.leased("net")) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert corner.leased("net") == {} and not list(corner.records.iterdir())
        await corner.cni.remove_netns(pod.netns)

    async def scenario() -> None:
        for _ in range(5):
            await one()
        no_ports_left(corner)
        assert list(corner.netns.iterdir()) == []

    asyncio.run(scenario())


def test_o1_cancelled_at_any_moment_an_add_leaves_nothing(corner: Corner) -> None:
    async def scenario() -> None:
        for step in range(40):
            pod = await make_pod(corner)
            task = asyncio.create_task(corner.cni.add(pod))
            await asyncio.sleep(step * 0.0002)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                assert corner.leased() == {} and not list(corner.records.glob("*.json"))
            else:
                await corner.cni.delete(pod)
            await corner.cni.remove_netns(pod.netns)
        no_ports_left(corner)

    asyncio.run(scenario())


def test_o2_a_failing_delete_keeps_the_record_until_it_works(corner: Corner) -> None:
    script = SPY + 'if [ "$CNI_COMMAND" = DEL ] && [ ! -e "$0.well" ]; then echo broken >&2; exit 1; fi\n'
    corner.program("spy", script + "cat <<E\n" + '{"cniVersion":"1.0.0","ips":[{"address":"192.0.2.77/24"}]}\nE')
    corner.conflist("net", [corner.bridge_plugin(), {"type": "spy"}])

    async def scenario() -> None:
        pod = await make_pod(corner)
        await corner.cni.add(pod)
        for _ in range(3):
            with refused("plugin spy: delete pod .*exit code 1; it said: broken", StatusCode.UNKNOWN):
                await corner.cni.delete(pod)
            assert len(corner.leased("net")) == 1 and (corner.records / f"{pod.id}.json").exists()
        await corner.cni.remove_netns(pod.netns)
        corner.restart()
        (corner.config.bin_dirs[0] / "spy.well").touch()
        await corner.cni.delete(pod)
        assert corner.leased("net") == {} and not list(corner.records.iterdir())
        last = (corner.config.bin_dirs[0] / "spy.calls").read_text().splitlines()[-1]
        assert last == f"DEL {pod.id}  eth0"  # the namespace was gone by then: an empty CNI_NETNS

    asyncio.run(scenario())


def test_o2_collect_goes_on_after_a_failing_plugin(corner: Corner) -> None:
    script = 'test "$CNI_COMMAND" != DEL || test -e "$0.well" || exit 1\n'
    corner.program("spy", script + "cat <<E\n" + '{"cniVersion":"1.0.0","ips":[{"address":"192.0.2.77/24"}]}\nE')
    corner.conflist("good", [corner.bridge_plugin()], file="10-a.conflist")
    corner.conflist("sick", [{"type": "spy"}], file="20-b.conflist")

    async def scenario() -> None:
        sick, good = await make_pod(corner, network="sick"), await make_pod(corner)
        for pod in (sick, good):
            await corner.cni.add(pod)
        await corner.cni.collect(frozenset())
        assert corner.leased("good") == {} and [path.stem for path in corner.records.iterdir()] == [sick.id]
        (corner.config.bin_dirs[0] / "spy.well").touch()
        await corner.cni.collect(frozenset())
        assert not list(corner.records.iterdir()) and not list(corner.netns.iterdir())

    asyncio.run(scenario())


def test_o2_an_add_tells_whether_its_undoing_failed_too(corner: Corner) -> None:
    corner.program("sick", 'test "$CNI_COMMAND" = DEL -a -e "$0.well" && exit 0; exit 1')
    corner.conflist("sick", [{"type": "sick"}])

    async def scenario() -> None:
        pod = await make_pod(corner)
        for left in (True, False):
            with pytest.raises(NetworkError, match="plugin sick: add pod") as caught:
                await corner.cni.add(pod)
            assert caught.value.left == left == bool(list(corner.records.iterdir()))
            (corner.config.bin_dirs[0] / "sick.well").touch()
        await remove_pod(corner, pod)

    asyncio.run(scenario())


def test_r14_a_hanging_plugin_holds_up_no_other_pod(corner: Corner) -> None:
    corner.program("slow", 'echo >> "$0.began"; exec sleep 1000')
    corner.conflist("good", [corner.bridge_plugin()], file="10-a.conflist")
    corner.conflist("slow", [{"type": "slow"}], file="20-b.conflist")

    async def scenario() -> None:
        stuck = [await make_pod(corner, network="slow") for _ in range(8)]
        tasks = [asyncio.create_task(corner.cni.add(pod)) for pod in stuck]
        began = corner.config.bin_dirs[0] / "slow.began"
        while not began.exists() or len(began.read_text()) < len(stuck):
            await asyncio.sleep(0.005)
        with soon():
            async with running_pod(corner):
                assert await corner.cni.status() is None
        assert not any(task.done() for task in tasks)
        corner.program("slow", "exit 0")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pod in stuck:
            await remove_pod(corner, pod)

    asyncio.run(scenario())


# A plugin whose DEL does not end before there is FILE.well.
STUCK = """\
test "$CNI_COMMAND" = DEL || exec echo '{"cniVersion":"1.0.0","ips":[{"address":"192.0.2.77/24"}]}'
echo "$CNI_CONTAINERID" >> "$0.began"
until test -e "$0.well"; do sleep 0.02; done"""


def test_r14_a_start_does_not_wait_for_the_plugins_of_pods_that_are_gone(
    corner: Corner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cri.network.cni._LEFT_S", 0.1)
    program = corner.program("stuck", STUCK)
    corner.conflist("stuck", [{"type": "stuck"}])

    async def scenario() -> None:
        gone = [await make_pod(corner) for _ in range(3)]
        for pod in gone:
            await corner.cni.add(pod)
        corner.restart()
        await corner.cni.collect(frozenset())
        assert {path.stem for path in corner.records.iterdir()} == {pod.id for pod in gone}
        Path(f"{program}.well").touch()
        eventually(lambda: not list(corner.records.iterdir()) and not list(corner.netns.iterdir()))

    asyncio.run(scenario())


def test_r14_the_end_of_the_daemon_waits_for_no_plugin(corner: Corner) -> None:
    program = corner.program("stuck", STUCK)
    corner.conflist("stuck", [{"type": "stuck"}])

    async def scenario() -> None:
        pods = [await make_pod(corner) for _ in range(2)]
        for pod in pods:
            await corner.cni.add(pod)
        task = asyncio.create_task(corner.cni.delete(pods[0]))
        while not (began := Path(f"{program}.began")).exists():
            await asyncio.sleep(0.005)
        with soon():
            corner.cni.interrupt()
            with pytest.raises(NetworkError, match="plugin stuck: delete pod .*killed"):
                await task
            with pytest.raises(NetworkError, match="plugin stuck: delete pod .*killed"):
                await corner.cni.delete(pods[1])  # one that comes meanwhile
        assert {path.stem for path in corner.records.iterdir()} == {pod.id for pod in pods}
        corner.restart()
        Path(f"{program}.well").touch()
        for pod in pods:
            await remove_pod(corner, pod)
        assert set(began.read_text().split()) == {pod.id for pod in pods}

    asyncio.run(scenario())


# ----------------------------------------------------------------------------------------------- status and CNI 1.1


def test_status_names_what_is_wrong_and_notices_a_mended_file(corner: Corner) -> None:
    async def scenario() -> None:
        bad = corner.conflist("x", [{"type": "../sh"}], file="05-bad.conflist")
        reason = await corner.cni.status()
        assert reason is not None and reason.startswith("no network configuration that can be used in ")
        assert "05-bad.conflist: plugins[0].type: '../sh' is not a plugin's name" in reason
        corner.conflist("good", [corner.bridge_plugin()], file="10-good.conflist")
        assert await corner.cni.status() is None and len(corner.cni.problems()) == 1
        bad.unlink()
        corner.conflist("first", [{"type": "nosuch"}], file="05-bad.conflist")
        reason = await corner.cni.status()
        assert reason is not None and reason.startswith("network first: no program nosuch in")

    asyncio.run(scenario())


def test_status_asks_the_programs_of_a_1_1_list(corner: Corner) -> None:
    sick = (
        """if [ "$CNI_COMMAND" = STATUS ]; then echo '{"cniVersion":"1.1.0","code":50,"msg":"no pool"}'; exit 1; fi"""
    )
    corner.program("spy", SPY + sick)
    corner.conflist("net", [{"type": "spy"}], version="1.1.0")
    reason = asyncio.run(corner.cni.status())
    assert reason is not None
    assert "network net: plugin spy: no pool (code 50); it is not ready for pods" in reason
    assert asyncio.run(corner.cni.status()) == reason and _calls(corner) == ["STATUS"]


def test_collect_tells_programs_of_a_1_1_list_what_is_valid(corner: Corner) -> None:
    spy = corner.program("spy", SPY + ANSWER)
    corner.conflist("net", [{"type": "spy"}], version="1.1.0")
    valid = pod_id()
    asyncio.run(corner.cni.collect(frozenset({valid})))
    given = json.loads(Path(f"{spy}.GC.stdin").read_text())
    assert given["cni.dev/valid-attachments"] == [{"containerID": valid, "ifname": "eth0"}]


def test_the_newest_version_that_all_programs_speak_is_used(corner: Corner) -> None:
    versions = """if [ "$CNI_COMMAND" = VERSION ]; then
        echo '{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0"]}'; exit 0; fi\n"""
    spy = corner.program("spy", SPY + versions + ANSWER)
    path = corner.conflist("net", [{"type": "spy"}])
    path.write_text(
        json.dumps({"cniVersions": ["0.4.0", "1.0.0", "1.1.0"], "name": "net", "plugins": [{"type": "spy"}]})
    )

    async def scenario() -> None:
        async with running_pod(corner):
            assert json.loads(Path(f"{spy}.ADD.stdin").read_text())["cniVersion"] == "1.0.0"
        assert json.loads(Path(f"{spy}.DEL.stdin").read_text())["cniVersion"] == "1.0.0"

    asyncio.run(scenario())


# -------------------------------------------------------------------------------------------------------- host ports


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        return int(sock.getsockname()[1])


def _through(corner: Corner, pod: PodNetwork, client: PodNetwork | None, address: str, host: int, inside: int) -> str:
    with listen(pod, "0.0.0.0", inside) as listener, connect(client, address, host) as sock:
        accepted, peer = listener.accept()
        with accepted:
            sock.sendall(b"x")
            assert accepted.recv(1) == b"x"
        return str(peer[0])


@pytest.mark.parametrize("how", ["native", "reference"])
def test_host_ports_reach_the_pod_from_everywhere(tmp_path: Path, how: str) -> None:
    needs("root", "nftables")

    def on_a_host_of_its_own() -> None:  # the reference plugin leaves its iptables chains behind
        with network_corner(tmp_path) as corner:
            _reach_from_everywhere(corner, how)

    isolated(on_a_host_of_its_own)


def _reach_from_everywhere(corner: Corner, how: str) -> None:
    port = _free_port()
    portmap: dict[str, object] = {"type": "portmap", "capabilities": {"portMappings": True}}
    if how == "reference":
        portmap["backend"] = "iptables"
    # Hairpin: with bridge-nf-call-iptables the pod's way to itself goes over its own port of the bridge twice.
    corner.conflist("net", [corner.bridge_plugin(hairpinMode=True), portmap])
    gateway = corner.subnet.replace(".0/24", ".1")

    async def scenario() -> None:
        async with running_pod(corner, ports=(PortMapping(port, 80),)) as (pod, _), running_pod(corner) as (other, _):
            assert _through(corner, pod, None, gateway, port, 80)
            assert _through(corner, pod, other, gateway, port, 80)
            assert _through(corner, pod, pod, gateway, port, 80)  # itself, by the node's address
            assert _through(corner, pod, None, "127.0.0.1", port, 80)
            if how == "native":
                again = await make_pod(corner, ports=(PortMapping(port, 81),))
                words = rf"plugin portmap .*host port {port}/tcp leads to pod {pod.id}"
                with refused(words, StatusCode.FAILED_PRECONDITION):
                    await corner.cni.add(again)
                await remove_pod(corner, again)
        with pytest.raises(ConnectionRefusedError):
            _refused(port)

    asyncio.run(scenario())


def _refused(port: int) -> None:
    connect(None, "127.0.0.1", port, 2).close()


@pytest.mark.parametrize("others", [0, 20])  # few ports and many are looked for in different ways
def test_o59_a_host_port_leads_to_the_new_pod_at_once_even_for_a_running_udp_flow(corner: Corner, others: int) -> None:
    port = _free_port()
    gateway = corner.subnet.replace(".0/24", ".1")

    def bound() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", 53))
        sock.settimeout(SOON_S)
        return sock

    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for number in range(3):
                ports = tuple(PortMapping(port + other, 53, "udp") for other in range(1 + others))
                pod = await make_pod(corner, ports=ports)
                await corner.cni.add(pod)
                with in_pod(pod, bound) as server:
                    client.sendto(b"%d" % number, (gateway, port))  # the same flow each time
                    assert server.recv(16) == b"%d" % number
                if number == 1:  # killed: nobody called DEL
                    corner.restart()
                    await corner.cni.collect(frozenset())
                else:
                    await remove_pod(corner, pod)

    asyncio.run(scenario())


def test_host_ports_of_an_address_and_of_ipv6(corner: Corner) -> None:
    port = _free_port()
    plugin = corner.bridge_plugin()
    six = f"fd00:{os.urandom(2).hex()}:1::"
    plugin["ipam"] = {"type": "host-local", "ranges": [[{"subnet": corner.subnet}], [{"subnet": f"{six}/64"}]]}
    corner.conflist("net", [plugin, {"type": "portmap", "capabilities": {"portMappings": True}}])
    gateway = corner.subnet.replace(".0/24", ".1")
    ports = (PortMapping(port, 80, host_ip=gateway), PortMapping(port + 1, 81, host_ip="::"))

    async def scenario() -> None:
        async with running_pod(corner, ports=ports) as (pod, result):
            assert _through(corner, pod, None, gateway, port, 80)
            with pytest.raises(ConnectionRefusedError):
                _refused(port)
            with listen(pod, "::", 81) as listener, connect(None, f"{six}1", port + 1):
                listener.accept()[0].close()
            # Nothing leaves the host from ::1, so what listens there is reached, as 127.0.0.1 would be otherwise.
            with listen(None, "::1", port + 1) as listener, connect(None, "::1", port + 1):
                listener.accept()[0].close()
            assert len(result.ips) == 2

    asyncio.run(scenario())
