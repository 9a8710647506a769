"""kill -9 of the daemon at every step of every verb, with real parts: its next start leaves nothing half-made, and the
same request succeeds (threats O3, O7, O8)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from conformance.cri_client import container
from conformance.leaks import Machine
from cri.api import api_pb2 as pb
from tests import warm
from tests.e2e import Node, lent, retired, seasoned, stocked
from tests.fakes.registry import FakeRegistry
from tests.support import SOON_S, eventually, needs

ROOT = Path(__file__).parents[2]


def _points(verb: str) -> list[str]:
    text = "".join(path.read_text() for path in sorted((ROOT / "cri").rglob("*.py")))
    return sorted(set(re.findall(rf'failpoint\("({verb}\.[a-z_.]+)"\)', text)))


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    needs("root", "overlay", "busybox")
    with stocked() as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> Iterator[Node]:
    with seasoned(tmp_path_factory.mktemp("n") / "n", registry) as made:
        assert _ocid(made, "run", "--rm", made.image, "true").returncode == 0
        (made.root / "volumes").mkdir()
        made.end()
        yield made


@pytest.fixture
def here(shared: Node) -> Iterator[Node]:
    with lent(shared) as made:
        yield made


@pytest.fixture
def own(tmp_path: Path, registry: FakeRegistry) -> Iterator[Node]:
    """For whoever takes more from it than its daemon."""
    with seasoned(tmp_path / "n", registry) as made:
        yield made


@pytest.fixture
def image(registry: FakeRegistry) -> str:
    return f"{registry.name}/busybox:1"


def _to_die_at(here: Node, point: str) -> None:
    """Restarts the daemon so that it dies at `point`."""
    here.end()
    os.environ["OCID_FAILPOINTS"] = f"{point}=kill"
    try:
        here.start()
    finally:
        del os.environ["OCID_FAILPOINTS"]


def _killed_at(here: Node, point: str, call: Callable[[], object]) -> None:
    """Restarts the daemon so that it dies at `point`, makes the call, and starts it again."""
    _to_die_at(here, point)
    with pytest.raises(grpc.RpcError):
        call()
    assert here.process is not None
    assert here.process.wait(SOON_S) == -9, point
    here.end()
    here.start()


def _held(here: Node) -> set[str]:
    """What is there, processes of the node itself aside: they differ from start to start."""
    return {line for line in here.held() if not line.startswith("process ")}


def _nothing_new(here: Node, before: set[str], point: str) -> None:
    try:
        eventually(lambda: _held(here) - before == set())
    except AssertionError:
        pytest.fail(f"{point}: left {_held(here) - before}")


def test_o3_o8_run_pod(here: Node, image: str) -> None:
    before = _held(here)
    # Of the network's points only plugins that are programs pass the others: test_network_programs has those.
    points = _points("run_pod") + [point for point in _points("network") if not point.startswith("network.plugin")]
    for point in points:
        config = here.pod_config(network=True)
        _killed_at(here, point, lambda config=config: here.client.run_pod(config))
        made = here.client.list_pods()
        if point == "run_pod.made":  # it was whole, and only the answer is missing
            assert [pod.state for pod in made] == [pb.SANDBOX_READY]
            here.drop(made[0].id)
        else:
            assert made == [], point
        _nothing_new(here, before, point)
        here.drop(here.client.run_pod(config))
        _nothing_new(here, before, point)


def test_o3_o8_create_container(here: Node, image: str) -> None:
    config = here.pod_config()
    pod = here.client.run_pod(config)
    before = _held(here)
    one = container("one", image, ["sleep", "1000"])
    for point in _points("create_container"):
        _killed_at(here, point, lambda: here.client.create(pod, one, config))
        made = here.client.list_containers()
        if point == "create_container.made":
            here.client.remove(made[0].id)
        else:
            assert made == [], point
        _nothing_new(here, before, point)
        again = here.client.create(pod, one, config)
        here.client.start(again)
        here.client.remove(again)
        _nothing_new(here, before, point)


def test_o37_start_container(here: Node, image: str) -> None:
    config = here.pod_config()
    pod = here.client.run_pod(config)
    before = _held(here)
    for point in _points("start_container"):
        one = here.client.create(pod, container("one", image, ["sleep", "1000"]), config)
        _killed_at(here, point, lambda one=one: here.client.start(one))
        if here.client.status(one).state == pb.CONTAINER_CREATED:
            here.client.start(one)
        assert here.client.status(one).state == pb.CONTAINER_RUNNING, point
        assert here.client.exec_sync(one, ["true"])[0] == 0, point
        here.client.remove(one)
        _nothing_new(here, before, point)


def test_o7_taking_away(here: Node, image: str) -> None:
    before = _held(here)
    for point in _points("stop_pod") + _points("remove_pod") + _points("remove_container"):
        pod, _, _ = here.run(image, ["sleep", "1000"], network=True)
        _killed_at(here, point, lambda pod=pod: here.client.remove_pod(pod))
        assert [one.state for one in here.client.list_pods()] == [pb.SANDBOX_NOTREADY], point
        here.client.remove_pod(pod)
        _nothing_new(here, before, point)


def _ocid(node: Node, *words: str, point: str = "") -> subprocess.CompletedProcess[bytes]:
    """A command of `node`, which dies at the failpoint `point`."""
    environment = {**os.environ, "OCID_FAILPOINTS": f"{point}=kill"} if point else None
    return warm.run([*node.words, *words], env=environment, timeout=SOON_S)


@pytest.fixture
def alone(tmp_path: Path, registry: FakeRegistry) -> Iterator[Node]:
    """A node without a daemon, which has the image and has run a container."""
    made, before = Node(tmp_path / "n"), Machine.now()
    made.image = f"{registry.name}/busybox:1"
    try:
        assert _ocid(made, "run", "--rm", made.image, "true").returncode == 0
        yield made
    finally:
        retired(made, before)


def test_o8_ocid_run_without_a_daemon(alone: Node) -> None:
    """Whatever it was killed at, it leaves a container that can be seen and removed, or nothing."""
    before = _held(alone)
    points = ["network.recorded", *(point for verb in ("run_pod", "create_container") for point in _points(verb))]
    for point in points:
        done = _ocid(alone, "run", "-d", "--name", "one", alone.image, "sleep", "1000", point=point)
        assert done.returncode == -9, (point, done)
        if point == "create_container.made":
            assert _ocid(alone, "rm", "one").returncode == 0
        assert json.loads(_ocid(alone, "ps", "-a", "--format", "json").stdout) == [], point
        _nothing_new(alone, before, point)


def test_o7_ocid_rm_without_a_daemon(alone: Node) -> None:
    before = _held(alone)
    for point in ("remove_container.gone", "stop_pod.recorded", "stop_pod.disconnected", "remove_pod.directory"):
        assert _ocid(alone, "run", "-d", "--name", "one", alone.image, "sleep", "1000").returncode == 0
        done = _ocid(alone, "rm", "-f", "one", point=point)
        assert done.returncode == -9, (point, done)
        if json.loads(_ocid(alone, "ps", "-a", "--format", "json").stdout):
            assert _ocid(alone, "rm", "-f", "one").returncode == 0, point
        _nothing_new(alone, before, point)


def test_o8_ocid_run_with_a_daemon_that_is_killed(here: Node, image: str) -> None:
    before = _held(here)
    for point in ("run_pod.made", "create_container.recorded", "create_container.bundled"):
        _to_die_at(here, point)
        done = _ocid(here, "run", "-d", "--name", "one", image, "sleep", "1000")
        assert done.returncode == 125 and done.stderr.count(b"\n") == 1, (point, done)
        assert f"the daemon at {here.socket} has ended".encode() in done.stderr
        here.end()
        here.start()
        assert here.client.list_pods() == [], point
        _nothing_new(here, before, point)


def test_o8_what_a_killed_command_had_made_goes_with_it(here: Node, image: str, tmp_path: Path) -> None:
    """Beside a daemon, which goes on: no pod that no command shows, no address, no directory of its logs."""
    before = _held(here)
    spec = {"hostNetwork": True, "volumes": [{"name": "v", "emptyDir": {}}]}
    spec["initContainers"] = [{"name": "first", "image": image, "command": ["true"]}]
    spec["containers"] = [{"name": "main", "image": image, "command": ["sleep", "1000"]}]
    played = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "played"}, "spec": spec}
    (tmp_path / "pod.yaml").write_text(json.dumps(played))
    run = ("run", "-d", "--name", "one", image, "sleep", "1000")
    play = ("pod", "play", str(tmp_path / "pod.yaml"))
    cases = [("ocid_run.pod", run), ("ocid_run.created", run), ("ocid_run.started", run), ("ocid_play.init", play)]
    for point, words in cases:
        assert _ocid(here, *words, point=point).returncode == -9, point
        eventually(lambda: here.client.list_pods() == [], what=f"what was made before {point} to go")
        _nothing_new(here, before, point)
    assert _ocid(here, *run).returncode == 0
    assert [one.state for one in here.client.list_pods()] == [pb.SANDBOX_READY]
    assert _ocid(here, "rm", "-f", "one").returncode == 0


def test_o44_a_database_that_is_garbled_costs_its_pods_and_not_the_node(own: Node, image: str) -> None:
    own.run(image, ["sleep", "1000"], network=True)
    own.end(9)
    database = own.root / "ocid.db"
    for suffix in ("-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
    database.write_bytes(os.urandom(32768))
    own.start()
    assert own.client.list_pods() == [] and list(own.root.glob("ocid.db.damaged-*"))
    assert not list((own.state / "pods").iterdir()) and not list((own.state / "bundles").iterdir())
    own.client.pull(image)
    again, two, _ = own.run(image, ["sleep", "1000"], network=True)
    assert own.client.exec_sync(two, ["true"])[0] == 0
    own.drop(again)
    for path in own.root.glob("ocid.db.damaged-*"):
        path.unlink()
