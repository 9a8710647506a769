"""What tests of `ocid` as a person types it share; imported late, since other tests fork and want no threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e import Node
    from tests.fakes.registry import FakeRegistry


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    """With `busybox:1`; other modules have another of this name."""
    from tests.e2e import stocked

    with stocked() as made:
        yield made


@pytest.fixture(scope="module", params=["alone", "served"])
def cli(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry
) -> Iterator[Node]:
    """A node without a daemon, and one with; both have the image and have run a container."""
    from tests.commands import prepared

    with prepared(request.param == "served", tmp_path_factory.mktemp("cli"), registry) as made:
        yield made


@pytest.fixture
def as_before(cli: Node) -> Iterator[None]:
    """Whatever a test runs, it takes away; then the node holds what it held: no volume, no log, no record."""
    before = cli.held()
    yield
    cli.settles(before)
