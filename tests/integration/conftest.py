"""Every test here leaves the machine as it found it (tests/conftest.py); and what tests of `ocid` as a person types it
share, imported late, since other tests fork and want no threads."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from conformance.leaks import Machine
from tests.conftest import MARK, settled

if TYPE_CHECKING:
    from tests.e2e import Node
    from tests.fakes.registry import FakeRegistry


# These fork without exec. A thread that is just being made then, as faulthandler's watch is for every test, never gets
# further in the child, and glibc's setgroups(3) waits there for all threads that it knows of.
FORKING = frozenset(
    f"test_{name}.py"
    for name in (
        *("runtime_api", "runtime_events", "runtime_linux", "runtime_namespaces", "runtime_successor"),
        *("cgroups_processes", "seccomp_kernel"),
    )
)
# In the virtual machine all is compared at the end alone: two looks at /proc take seconds under emulation.
EACH = not os.environ.get("OCID_VM")

_last_seen = pytest.StashKey[Machine]()


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a test that leaves a mount, namespace or process of its own. Cgroups, whose names say nothing of a test,
    are for those who make them, and for who compares the whole machine."""
    if request.path.name in FORKING:
        faulthandler.cancel_dump_traceback_later()
    if not EACH:
        yield
        return
    before = Machine.now(shared=False, since=request.session.stash.get(_last_seen, None))
    yield
    marks = [str(tmp_path_factory.getbasetemp()), f"{MARK}={os.environ[MARK]}"]
    found, request.session.stash[_last_seen] = settled(before, marks)
    if found:
        pytest.fail("the test left behind:\n  " + "\n  ".join(found), pytrace=False)


@pytest.fixture(scope="session")
def registry() -> Iterator[FakeRegistry]:
    """With `busybox:1`; some modules have another of this name."""
    from tests.e2e import stocked

    with stocked() as made:
        yield made


@pytest.fixture(scope="session", params=["alone", "served"])
def cli(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry
) -> Iterator[Node]:
    """A node without a daemon, and one with; both have the image and have run a container. Each test leaves them as
    they were (`as_before`), so all of a session share them: to make one costs as much as four tests."""
    from tests.commands import prepared

    with prepared(request.param == "served", tmp_path_factory.mktemp("cli"), registry) as made:
        yield made


@pytest.fixture
def as_before(cli: Node) -> Iterator[None]:
    """Whatever a test runs, it takes away; then the node holds what it held: no volume, no log, no record."""
    before = cli.held()
    yield
    cli.settles(before)
