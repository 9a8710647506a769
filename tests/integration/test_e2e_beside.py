"""Commands where something beside them is not as it should be: a daemon with another state directory, records that were
damaged."""

from __future__ import annotations

from pathlib import Path

from conformance.leaks import Machine
from tests.commands import ocid, said
from tests.e2e import Node, node, retired
from tests.support import needs


def test_a_daemon_with_another_state_directory_is_named_at_once(tmp_path: Path) -> None:
    """It used to be waited for, for a minute, which is longer than a command has here."""
    needs("root", "overlay")
    with node(tmp_path) as served:
        done = ocid(served, "--state", str(tmp_path / "other"), "ps")
        assert done.returncode == 125
        assert f"serves {served.socket}: say --state {served.state}" in done.stderr, done.stderr
        assert said(served, "ps")  # it goes on
    # The lock of one that has ended says nothing any more.
    assert said(served, "--state", str(tmp_path / "other"), "ps")


def test_o44_damaged_records_are_told_of_without_a_daemon_too(tmp_path: Path) -> None:
    needs("root", "overlay")
    alone, before = Node(tmp_path), Machine.now()
    try:
        said(alone, "ps")
        database = alone.root / "ocid.db"
        with open(database, "r+b") as file:
            file.write(b"not a database, " * 64)
        done = ocid(alone, "ps")
        assert done.returncode == 0 and f"ocid: database {database} is damaged" in done.stderr, done.stderr
        assert len(list(alone.root.glob("ocid.db.damaged-*"))) >= 1
        assert ocid(alone, "ps").stderr == ""
    finally:
        retired(alone, before)
