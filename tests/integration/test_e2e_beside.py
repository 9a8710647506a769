"""Commands where something beside them is not as it usually is: a daemon with another state directory, records that
were damaged, another runtime."""

from __future__ import annotations

import shutil
from pathlib import Path

from conformance.leaks import Machine
from tests.commands import ocid, said
from tests.e2e import Node, busybox_layout, node, retired
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


def test_what_another_runtime_runs_is_started_again_too(tmp_path: Path) -> None:
    """Its root filesystem is mounted on the host, and once more for each run; --init it has not."""
    needs("root", "overlay")
    runc = f'default_handler = "runc"\n[runtime.handlers]\nrunc = "{shutil.which("runc")}"\n'
    alone, before = Node(tmp_path, runtime=runc), Machine.now()
    image = f"oci:{busybox_layout()}:busybox:1"
    script = "echo x >>/runs; wc -l </runs; exit 3"
    try:
        words = ("run", "-d", "--net", "host", "--name", "f")
        said(alone, *words, "--restart", "on-failure:2", image, "sh", "-c", script)
        assert said(alone, "wait", "f") == "3\n"
        assert said(alone, "logs", "f") == "1\n2\n3\n"
        said(alone, "rm", "f")
        refused = ocid(alone, *words, "--init", image, "true")
        assert refused.returncode == 125 and "annotations[ocid.init]: not with runtime handler 'runc'" in refused.stderr
    finally:
        retired(alone, before)
