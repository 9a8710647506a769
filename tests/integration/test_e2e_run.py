"""What `ocid run` does for a container beyond its command: a PID 1 that reaps (--init)."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Terminal, end, line, ocid, once, prepared, said, start
from tests.e2e import Node, stocked
from tests.fakes.registry import FakeRegistry
from tests.support import eventually


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with stocked() as made:
        yield made


@pytest.fixture(scope="module", params=["alone", "served"])
def cli(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry
) -> Iterator[Node]:
    """A node without a daemon, and one with; both have the image and have run a container."""
    with prepared(request.param == "served", tmp_path_factory.mktemp("cli"), registry) as made:
        yield made


@pytest.fixture(autouse=True)
def as_before(cli: Node) -> Iterator[None]:
    """Whatever a test runs, it takes away; then the node holds what it held."""
    before = cli.held()
    yield
    cli.settles(before)


# ------------------------------------------------------------------------------------------------------------- --init


def test_init_is_pid_1_and_reaps(cli: Node) -> None:
    """An orphan that has ended is gone, where the command itself, as PID 1, would have kept a zombie."""
    # An orphan for whoever is PID 1; the command reaps nothing: it is no shell any more.
    script = "(sleep 0.05 & echo $!) ; exec cat"
    for words, zombie in ((["--init"], False), ([], True)):
        process = start(
            cli, "run", "--rm", "-i", "--name", "r", *words, cli.image, "sh", "-c", script, stdin=subprocess.PIPE
        )
        orphan = line(process)
        status = f"/proc/{orphan}/status"

        def state(path: str = status) -> str:
            told = ocid(cli, "exec", "r", "grep", "State", path)
            return told.stdout.split()[1] if told.returncode == 0 else "gone"

        eventually(lambda: state() in ("Z", "gone"), what="the orphan to end")  # noqa: B023 - called at once
        assert state() == ("Z" if zombie else "gone")
        assert said(cli, "exec", "r", "cat", "/proc/1/comm") == ("ocid-init\n" if words else "cat\n")
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        assert end(process)[0] == 0


@pytest.mark.parametrize("words", [["--init"], []])
def test_the_end_of_a_command_is_told_as_without(cli: Node, tmp_path: Path, words: list[str]) -> None:
    once(cli, *words, "IMAGE", "sh", "-c", "exit 7", code=7)
    missing = ocid(cli, "run", "--rm", *words, cli.image, "nosuch")
    assert (missing.returncode, "nosuch" in missing.stderr) == (127, True)
    assert ocid(cli, "run", "--rm", *words, cli.image, "/etc").returncode == 126
    # What only execve(2) finds out, when PID 1 is there already.
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = ocid(cli, "run", "--rm", "-v", f"{script}:/script:ro", *words, cli.image, "/script")
    assert done.returncode == 127 and "its interpreter" in done.stderr, done.stderr
    # Who kills itself: PID 1 of a namespace cannot, a command below one can.
    once(cli, *words, "IMAGE", "sh", "-c", "kill -9 $$; exit 3", code=137 if words else 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_init_passes_signals_on(cli: Node, number: signal.Signals) -> None:
    """Also to a command that has no handler: below PID 1 the default action is what happens."""
    process = start(cli, "run", "--rm", "--init", cli.image, "sh", "-c", "echo ready; exec sleep 1000")
    assert line(process) == "ready"
    process.send_signal(number)
    assert end(process)[0] == 128 + number


def test_init_on_a_terminal_has_the_command_in_the_foreground(cli: Node) -> None:
    terminal = Terminal([*cli.words, "run", "--rm", "--init", "-it", cli.image, "sh"])
    terminal.expect("# ")
    terminal.send(b"sh -c \"echo u''p; exec sleep 1000\"\n")
    terminal.expect("up")
    terminal.send(b"\x03")
    terminal.expect("# ")
    terminal.send(b"exit 4\n")
    assert terminal.end() == 4


def test_init_is_small_and_cannot_be_written_to(cli: Node) -> None:
    """Threats S1: /proc/1/exe leads to a sealed file without a name."""
    one = said(cli, "run", "-d", "--name", "s", "--init", cli.image, "sleep", "1000").strip()
    pid = int(said(cli, "inspect", "--format", "{{.info.pid}}", "s"))
    assert Path(f"/proc/{pid}/comm").read_text() == "ocid-init\n"
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    assert pages <= 16, f"{pages} pages are resident"
    assert sorted(Path(f"/proc/{pid}/fd").iterdir()) == [Path(f"/proc/{pid}/fd/{n}") for n in range(3)]
    refused = ocid(cli, "exec", "s", "sh", "-c", "echo >/proc/1/exe")
    assert refused.returncode != 0
    said(cli, "rm", "-f", one)
