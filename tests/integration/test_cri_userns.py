"""Pods with user namespaces on the real kernel: whose the files, namespaces and streams are, inside and on the host."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from conformance.cri_client import container
from cri.api import api_pb2 as pb
from runtime.linux.namespace import NS_GET_USERNS
from tests.e2e import Node, messages, node, stocked
from tests.fakes.registry import FakeRegistry
from tests.support import eventually, needs

FIRST, COUNT = 300_000, 65_536


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    needs("root", "overlay", "busybox")
    with stocked() as made:
        yield made


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> Iterator[Node]:
    with serving(tmp_path_factory.mktemp("userns"), registry) as made:
        yield made


@contextmanager
def serving(directory: Path, registry: FakeRegistry) -> Iterator[Node]:
    with node(directory / "n") as made:
        made.image = f"{registry.name}/busybox:1"
        made.client.pull(made.image)
        # One pod before anything is counted: zygote, bridge and the cached seccomp program stay.
        made.drop(made.run(made.image, ["true"], network=True)[0])
        yield made


def mapped(config: Any, first: int = FIRST, count: int = COUNT) -> Any:
    """The pod config with a user namespace of its own."""
    options = config.linux.security_context.namespace_options
    options.userns_options.mode = pb.POD
    for lines in (options.userns_options.uids, options.userns_options.gids):
        lines.add(container_id=0, host_id=first, length=count)
    return config


def in_pod(here: Node, config: Any, command: list[str], **fields: Any) -> tuple[str, str]:
    """A pod of `config` and a started container in it, which says the same of namespaces as its pod."""
    pod = here.client.run_pod(config)
    wanted = container("main", here.image, command)
    wanted.linux.security_context.namespace_options.CopyFrom(config.linux.security_context.namespace_options)
    for name, value in fields.items():
        getattr(wanted, name).extend(value)
    one = here.client.create(pod, wanted, config)
    here.client.start(one)
    return pod, one


def pid_of(here: Node, one: str) -> int:
    request = pb.ContainerStatusRequest(container_id=one, verbose=True)
    return int(json.loads(here.client.runtime.ContainerStatus(request).info["info"])["pid"])


def said(here: Node, one: str, script: str) -> str:
    code, out, err = here.client.exec_sync(one, ["sh", "-c", script])
    assert code == 0, err
    return out.decode()


def test_root_inside_is_nobody_on_the_host_and_owns_its_namespaces(here: Node) -> None:
    before = here.held()
    config = mapped(here.pod_config(network=True))
    config.linux.sysctls["net.ipv4.ip_unprivileged_port_start"] = "80"
    config.linux.sysctls["kernel.shm_rmid_forced"] = "1"
    pod, one = in_pod(here, config, ["sleep", "1000"])
    pid = pid_of(here, one)
    assert os.stat(f"/proc/{pid}").st_uid == FIRST
    assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", str(FIRST), str(COUNT)]
    user = os.stat(f"/proc/{pid}/ns/user").st_ino
    assert user != os.stat("/proc/self/ns/user").st_ino
    for kind in ("net", "ipc", "uts", "pid", "mnt", "cgroup"):
        fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        owner = fcntl.ioctl(fd, NS_GET_USERNS)
        assert os.fstat(owner).st_ino == user, kind
        os.close(owner)
        os.close(fd)
    address = here.client.pod_status(pod).network.ip
    assert address.startswith("10.") and address in said(here, one, "ip addr")
    assert said(here, one, "hostname").strip() == config.hostname
    assert said(here, one, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start") == "80\n"
    assert said(here, one, "cat /proc/sys/kernel/shm_rmid_forced") == "1\n"
    options = here.client.pod_status(pod).linux.namespaces.options.userns_options
    assert (options.mode, options.uids[0].host_id) == (pb.POD, FIRST)
    # What owns its network namespace may change it, and nothing of the host's.
    config2 = container("admin", here.image, ["sh", "-c", "ip link add d0 type dummy && ip link show d0"])
    config2.linux.security_context.capabilities.add_capabilities.append("NET_ADMIN")
    admin = here.client.create(pod, config2, config)
    here.client.start(admin)
    here.client.wait_exit(admin)
    assert "type dummy" not in Path(config.log_directory, "admin.log").read_text()
    here.drop(pod)
    here.settles(before)


def test_layers_are_mapped_and_not_copied(here: Node) -> None:
    pod, one = in_pod(here, mapped(here.pod_config(network=True)), ["sleep", "1000"])
    layers = list((here.root / "snapshots").rglob("bin/busybox"))
    assert layers and all(path.stat().st_uid == 0 for path in layers)
    assert said(here, one, "stat -c %u:%g / /bin/busybox /etc /dev/shm").split() == ["0:0"] * 4
    said(here, one, "touch /new /bin/newer && chown 7:8 /new && echo x >> /etc/hosts && echo y >> /etc/passwd")
    status = os.stat(f"/proc/{pid_of(here, one)}/root/new")
    assert (status.st_uid, status.st_gid) == (FIRST + 7, FIRST + 8)
    assert all(path.stat().st_uid == 0 for path in layers)
    said(here, one, "id -u; su -s /bin/sh nobody -c 'id -u' 2>/dev/null || true")
    here.drop(pod)


def test_streams_can_be_reopened_by_who_owns_them(here: Node) -> None:
    config = mapped(here.pod_config())
    script = "echo plain; echo again > /dev/stdout; echo bad > /proc/self/fd/2"
    pod, one = in_pod(here, config, ["sh", "-c", f"{script}; sleep 1000"])
    log = Path(config.log_directory) / "main.log"
    eventually(lambda: messages(log, "stderr") == ["bad"], what="stderr")
    assert messages(log) == ["plain", "again"]
    assert said(here, one, "echo hi > /dev/stdout") == "hi\n"
    here.drop(pod)


def test_volumes_with_mappings_are_the_containers_and_without_nobodys(here: Node, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    for owner in (0, 1000):
        (volume / f"f{owner}").touch()
        os.chown(volume / f"f{owner}", owner, owner)
    mount = pb.Mount(host_path=str(volume), container_path="/mapped")
    for lines in (mount.uidMappings, mount.gidMappings):
        lines.add(container_id=0, host_id=FIRST, length=COUNT)
    plain = pb.Mount(host_path=str(volume), container_path="/plain")
    pod, one = in_pod(here, mapped(here.pod_config()), ["sleep", "1000"], mounts=[mount, plain])
    assert said(here, one, "stat -c %u:%g /mapped/f0 /mapped/f1000").split() == ["0:0", "1000:1000"]
    assert said(here, one, "stat -c %u:%g /plain/f0 /plain/f1000").split() == ["65534:65534"] * 2
    said(here, one, "touch /mapped/new; chown 5:5 /mapped/new")
    assert ((volume / "new").stat().st_uid, (volume / "f0").stat().st_uid) == (5, 0)
    assert here.client.exec_sync(one, ["touch", "/plain/new2"])[0] != 0
    here.drop(pod)


def test_a_shared_pid_namespace_belongs_to_the_pods_user_namespace(here: Node) -> None:
    before = here.held()
    config = mapped(here.pod_config())
    config.linux.security_context.namespace_options.pid = pb.POD
    pod, one = in_pod(here, config, ["sleep", "1000"])
    assert "ocid-pause" in said(here, one, "cat /proc/1/comm")
    assert said(here, one, "stat -c %u /proc/1").strip() in ("0", "65534")
    pid = pid_of(here, one)
    fd = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY)
    owner = fcntl.ioctl(fd, NS_GET_USERNS)
    assert os.fstat(owner).st_ino == os.stat(f"/proc/{pid}/ns/user").st_ino
    os.close(owner)
    os.close(fd)
    # A small namespace has no "nobody" for pause to become.
    small = mapped(here.pod_config(), count=10)
    small.linux.security_context.namespace_options.pid = pb.POD
    other, _ = in_pod(here, small, ["sleep", "1000"])
    here.drop(other)
    here.drop(pod)
    here.settles(before)


def test_with_the_hosts_network_sys_is_the_hosts_and_read_only(here: Node) -> None:
    pod, one = in_pod(here, mapped(here.pod_config()), ["sleep", "1000"])
    assert said(here, one, "ls /sys/class/net").split() == sorted(os.listdir("/sys/class/net"))
    assert "ro" in said(here, one, "grep ' /sys ' /proc/mounts").split()[3].split(",")
    assert os.stat(f"/proc/{pid_of(here, one)}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
    here.drop(pod)


def test_two_pods_do_not_share_ids_and_limits_hold(here: Node) -> None:
    one_pod, one = in_pod(here, mapped(here.pod_config()), ["sleep", "1000"])
    two_pod, two = in_pod(here, mapped(here.pod_config(), first=FIRST + COUNT), ["sleep", "1000"])
    uids = {os.stat(f"/proc/{pid_of(here, each)}").st_uid for each in (one, two)}
    assert uids == {FIRST, FIRST + COUNT}
    status = here.client.runtime.Status(pb.StatusRequest())
    features = {handler.name: handler.features.user_namespaces for handler in status.runtime_handlers}
    assert features["native"] and features[""] and status.features.user_namespaces_host_network
    for pod in (one_pod, two_pod):
        here.drop(pod)


def test_o3_pods_with_user_namespaces_survive_the_daemon(tmp_path: Path, registry: FakeRegistry) -> None:
    with serving(tmp_path, registry) as here:
        _survives(here)


def _survives(here: Node) -> None:
    config = mapped(here.pod_config(network=True))
    pod, one = in_pod(here, config, ["sleep", "1000"])
    pid = pid_of(here, one)
    here.end(9)
    here.start()
    assert pid_of(here, one) == pid and said(here, one, "id -u") == "0\n"
    more = container("more", here.image, ["sh", "-c", "stat -c %u /bin/busybox"])
    two = here.client.create(pod, more, config)
    here.client.start(two)
    assert here.client.wait_exit(two) == 0
    assert messages(Path(config.log_directory) / "more.log") == ["0"]
    here.drop(pod)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uids": []}, "userns_options.uids: id 0"),
        ({"mode": pb.CONTAINER}, "userns_options.mode"),
        ({"mode": pb.NODE}, "mode NODE takes no mappings"),
        ({"uids": [(0, 300_000, 0)]}, "no ids"),
        ({"gids": [(1, 300_000, 5)]}, "gids: id 0"),
        ({"gids": [(0, 2**32 - 2, 5)]}, "largest id"),
        ({"uids": [(0, 300_000, 5), (9, 300_004, 5)]}, "host ids from 300004 are mapped twice"),
        ({"uids": [(n, 300_000 + n, 1) for n in range(341)]}, "the kernel takes 340"),
    ],
)
def test_mappings_that_no_kernel_takes_are_refused_by_their_field(
    here: Node, changes: dict[str, Any], message: str
) -> None:
    before = here.held()
    config = mapped(here.pod_config())
    options = config.linux.security_context.namespace_options.userns_options
    for name, value in changes.items():
        if name == "mode":
            options.mode = value
            continue
        options.ClearField(name)
        for inside, outside, length in value:
            getattr(options, name).add(container_id=inside, host_id=outside, length=length)
    with pytest.raises(grpc.RpcError, match=message):
        here.client.run_pod(config)
    assert here.held() == before


def test_a_container_says_what_its_pod_says(here: Node) -> None:
    config = mapped(here.pod_config())
    pod = here.client.run_pod(config)
    wanted = container("odd", here.image, ["true"])
    wanted.linux.security_context.namespace_options.userns_options.mode = pb.NODE
    with pytest.raises(grpc.RpcError, match="must be those of its pod sandbox"):
        here.client.create(pod, wanted, config)
    here.drop(pod)


def test_a_mount_that_the_host_is_to_see_is_refused_by_its_field(here: Node, tmp_path: Path) -> None:
    pod = here.client.run_pod(config := mapped(here.pod_config()))
    wanted = container("main", here.image, ["true"])
    wanted.linux.security_context.namespace_options.CopyFrom(config.linux.security_context.namespace_options)
    wanted.mounts.add(host_path=str(tmp_path), container_path="/v", propagation=pb.PROPAGATION_BIDIRECTIONAL)
    with pytest.raises(grpc.RpcError, match=r"mounts\[0\].propagation: .* in a pod with a user namespace") as refused:
        here.client.create(pod, wanted, config)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    here.drop(pod)


def test_a_sysctl_of_an_interface(here: Node) -> None:
    config = mapped(here.pod_config(network=True))
    config.linux.sysctls["net.ipv4.conf.eth0.arp_filter"] = "1"
    pod, one = in_pod(here, config, ["sleep", "1000"])
    assert here.client.exec_sync(one, ["cat", "/proc/sys/net/ipv4/conf/eth0/arp_filter"])[1] == b"1\n"
    here.drop(pod)


def test_it_costs_little_more_than_a_pod_without(here: Node) -> None:
    def took(config: Any) -> float:
        began = time.monotonic()
        pod, _ = in_pod(here, config, ["sleep", "1000"])
        spent = time.monotonic() - began
        here.drop(pod)
        return spent

    plain = min(took(here.pod_config()) for _ in range(5))
    with_users = min(took(mapped(here.pod_config())) for _ in range(5))
    assert with_users < plain * 5, (plain, with_users)


def test_a_terminal_and_a_privileged_container(here: Node) -> None:
    config = mapped(here.pod_config(network=True))
    config.linux.security_context.privileged = True
    pod = here.client.run_pod(config)
    shell = container("shell", here.image, ["sh", "-c", "tty; stat -c %u:%a /dev/pts/0; sleep 1000"])
    shell.tty = True
    one = here.client.create(pod, shell, config)
    here.client.start(one)
    log = Path(config.log_directory) / "shell.log"
    eventually(lambda: [line.strip() for line in messages(log)] == ["/dev/pts/0", "0:620"], what="the terminal")
    strong = container("strong", here.image, ["sleep", "1000"])
    strong.linux.security_context.privileged = True
    two = here.client.create(pod, strong, config)
    here.client.start(two)
    # All rights over what is the pod's own, and none over what is the host's.
    said(here, two, "mount -t tmpfs none /tmp && ip link set lo down && hostname changed")
    assert said(here, one, "hostname") == "changed\n"
    cgroup = "for f in /sys/fs/cgroup/*/release_agent /sys/fs/cgroup/*/*.limit_in_bytes; do echo 1 > $f && exit 0; done"
    for script in ("echo x > /proc/sys/kernel/core_pattern", "mknod /x c 1 3", f"{cgroup}; exit 1"):
        assert here.client.exec_sync(two, ["sh", "-c", script])[0] != 0, script
    here.drop(pod)


def test_with_the_hosts_ipc_namespace_but_not_its_processes(here: Node) -> None:
    config = mapped(here.pod_config())
    config.linux.security_context.namespace_options.pid = pb.NODE
    with pytest.raises(grpc.RpcError, match=r"namespace_options.pid: NODE cannot be had with a user namespace"):
        here.client.run_pod(config)
    config.linux.security_context.namespace_options.pid = pb.CONTAINER
    config.linux.security_context.namespace_options.ipc = pb.NODE
    pod, one = in_pod(here, config, ["sleep", "1000"])
    pid = pid_of(here, one)
    assert os.stat(f"/proc/{pid}/ns/ipc").st_ino == os.stat("/proc/self/ns/ipc").st_ino
    assert os.stat(f"/proc/{pid}").st_uid == FIRST
    here.drop(pod)


def test_what_is_to_be_started_again_is_so_in_its_namespaces(here: Node, tmp_path: Path) -> None:
    """`ocid run --restart` and `--init`: the next run has the ids, the layer, the volumes and the init of the first."""
    config = mapped(here.pod_config())
    pod = here.client.run_pod(config)
    wanted = container("main", here.image, ["sh", "-c", "echo up >>/up; echo up >>/data/up; exec sleep 1000"])
    wanted.linux.security_context.namespace_options.CopyFrom(config.linux.security_context.namespace_options)
    wanted.annotations["ocid.restart"], wanted.annotations["ocid.init"] = "always", "true"
    volume = wanted.mounts.add(container_path="/data", host_path=str(tmp_path))
    for lines in (volume.uidMappings, volume.gidMappings):
        lines.add(container_id=0, host_id=FIRST, length=COUNT)
    one = here.client.create(pod, wanted, config)
    here.client.start(one)
    first = pid_of(here, one)
    spaces = [os.readlink(f"/proc/{first}/ns/{kind}") for kind in ("user", "net", "ipc", "uts")]
    for restarts in (1, 2):
        before = pid_of(here, one)
        eventually(lambda restarts=restarts: len((tmp_path / "up").read_text().split()) == restarts)  # type: ignore[misc]
        os.kill(before, signal.SIGKILL)
        eventually(lambda before=before: pid_of(here, one) not in (0, before), what="the next run")  # type: ignore[misc]
    pid = pid_of(here, one)
    assert [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("user", "net", "ipc", "uts")] == spaces
    assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", str(FIRST), str(COUNT)]
    assert Path(f"/proc/{pid}/comm").read_text() == "ocid-init\n"
    eventually(lambda: said(here, one, "cat /up /data/up; id -u") == 6 * "up\n" + "0\n", what="three runs to say so")
    assert (tmp_path / "up").stat().st_uid == 0
    here.client.stop(one)
    assert here.client.status(one).state == pb.CONTAINER_EXITED
    here.drop(pod)
