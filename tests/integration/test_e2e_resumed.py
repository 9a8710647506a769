"""`ocid` as a program that goes on from a dump: like one that was started, and never from a dump that is not true, nor
where it reads what came from elsewhere."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cri.cli import addresses
from runtime import dump, install, made_of
from runtime.linux.processor import processor
from runtime.linux.sockets import recv_frame, send_frame
from runtime.shim import protocol
from tests import warm
from tests.commands import COMMAND_S, line, once, said
from tests.e2e import Node
from tests.support import eventually

PREFIX = Path(sys.prefix)
QUICK, SLOW = PREFIX / "bin/ocid", PREFIX / "lib/ocid/ocid"
Outcome = tuple[int, bytes, bytes]
SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)
_CANCEL = 32  # the C library's own signal, which nobody else can block


def outcome(command: Path, *words: str, env: Mapping[str, str] | None = None) -> Outcome:
    null = subprocess.DEVNULL
    run = subprocess.run([command, *words], env=env, stdin=null, capture_output=True, timeout=COMMAND_S, check=False)
    return run.returncode, run.stdout, run.stderr


# ---------------------------------------------------------------------------------------------------- as if started


def test_the_command_is_a_launcher_of_a_dump() -> None:
    """Not pip's entry point, which hack/setup writes over, and not the slow command."""
    (made,) = SLOW.parent.glob("dump-*")
    data = QUICK.read_bytes()
    assert data[:4] == b"\x7fELF" and os.fsencode(made) in data and os.fsencode(SLOW) in data
    assert SLOW.read_bytes()[:2] == b"#!" and made_of.stale(SLOW.parent) == ""


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--help",),
        ("version",),
        ("version", "--format", "json"),
        ("config",),
        ("nonsense",),
        ("--nonsense",),
        ("ps", "--nonsense"),
        ("pod",),
        ("run", "-d", "--rm", "x"),
        ("exec", "x"),
        ("run", "--name", "\udcff", "x"),
        ("--config", "/nowhere", "ps"),
        ("--root", "/proc/nowhere", "--state", "/proc/nowhere", "ps"),
        *((name, "--help") for name in ("exec", "inspect", "ps", "run")),
    ],
    ids=" ".join,
)
def test_it_says_what_a_started_one_says(words: tuple[str, ...]) -> None:
    assert outcome(QUICK, *words) == outcome(SLOW, *words)


def test_it_says_so_of_what_is_there(cli: Node) -> None:
    """The CRI through a daemon or the parts in its process, and a command in a container."""
    said(cli, "run", "-d", "--name", "there", cli.image, "sh", "-c", "echo out; echo err >&2; exec sleep 1000")
    eventually(lambda: "out" in said(cli, "logs", "there"), what="a log")
    asked = (
        ("ps", "-a", "--format", "json"),
        ("logs", "there"),
        ("images", "--format", "json"),
        ("inspect", "there"),
        ("inspect", cli.image),
        ("gc", "--dry-run"),
        ("exec", "there", "sh", "-c", "echo out; echo err >&2; exit 7"),
        ("exec", "there", "nosuch"),
        ("kill", "nothing"),
        ("rm", "there"),
    )
    for words in asked:
        quick = outcome(QUICK, *cli.words[1:], *words)
        # Forked from what has its imports already: that one started in earnest is alike, the tests around this show.
        slow = warm.run([str(SLOW), *cli.words[1:], *words], timeout=COMMAND_S)
        assert quick == (slow.returncode, slow.stdout, slow.stderr), words
    said(cli, "rm", "-f", "there")


def test_ids_and_names_are_new_each_time(cli: Node) -> None:
    made = {said(cli, "run", "-d", cli.image, "true").strip() for _ in range(2)}
    names = said(cli, "ps", "-a", "--format", "{{.ID}} {{.Names}}", "--no-trunc").splitlines()
    assert len(made) == 2 and len({row.split()[1] for row in names if row.split()[0] in made}) == 2
    said(cli, "rm", "-f", *made)


@pytest.mark.parametrize("ignored", [False, True])
def test_its_process_is_like_a_started_one(cli: Node, ignored: bool) -> None:
    """As the kernel knows it; ^C ends it in the same way."""
    seen = []
    said(cli, "run", "-d", "--name", "there", cli.image, "sh", "-c", "echo out; exec sleep 1000")
    # By a shell: gRPC's threads, which this process may have, begin anew in a child that runs Python, and abort it.
    prepare = "umask 027; " + ("trap '' INT HUP; " if ignored else "") + 'exec "$0" "$@"'
    for command in (QUICK, SLOW):
        words = ["sh", "-c", prepare, command, *cli.words[1:], "logs", "-f", "there"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                assert line(process) == "out"
                known = _known(process.pid), _is_dumped(process.pid)
                process.send_signal(signal.SIGTERM if ignored else signal.SIGINT)
                seen.append((*known, *process.communicate(timeout=COMMAND_S), process.returncode))
            finally:
                process.kill()
    said(cli, "rm", "-f", "there")
    (quick, dumped, *end), (slow, not_dumped, *end_slow) = seen
    assert quick == slow and end == end_slow and (dumped, not_dumped) == (True, False)


def _known(pid: int) -> dict[str, str]:
    place = Path(f"/proc/{pid}")

    def settled() -> dict[str, str]:
        """What its status says, but while it makes a thread: the C library blocks all signals then."""
        lines = [row.partition(":\t") for row in (place / "status").read_text().splitlines()]
        found = {name: value for name, _, value in lines}
        return {} if int(found["SigBlk"], 16) >> _CANCEL - 1 & 1 else found

    status = eventually(settled, what="a thread to be made")
    names = ("Name", "Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "SigBlk", "SigIgn", "SigCgt", "CapEff")
    personality = (place / "personality").read_text().strip()
    return {**{name: status[name] for name in names}, "limits": (place / "limits").read_text(), "as": personality}


def _is_dumped(pid: int) -> bool:
    return str(SLOW.parent / "dump-") in Path(f"/proc/{pid}/maps").read_text()


def test_s01_a_shim_without_a_zygote_goes_on_from_the_dump_of_ocirun_and_is_sealed(cli: Node) -> None:
    said(cli, "run", "-d", "--name", "there", cli.image, "sleep", "1000")
    (record,) = cli.state.glob("pods/*/shim.json")
    pid = int(json.loads(record.read_bytes())["pid"])
    is_dumped = str(PREFIX / "lib/ocirun/dump-") in Path(f"/proc/{pid}/maps").read_text()
    assert is_dumped == (cli.process is None)
    for flags in (os.O_WRONLY, os.O_RDWR):
        with pytest.raises(OSError) as caught:
            os.close(os.open(f"/proc/{pid}/exe", flags))
        assert caught.value.errno in (errno.EROFS, errno.EPERM, errno.ETXTBSY)
    assert Path(f"/proc/{pid}/exe").stat().st_dev not in (QUICK.stat().st_dev, os.stat(sys.executable).st_dev)
    status = _known(pid)
    assert status["Name"].startswith("shim ") and status["Umask"] == "0077"
    assert int(status["SigIgn"], 16) & 0x7FFFFFFF == sum(1 << number - 1 for number in SIGNALS)  # below the C library's
    assert os.getsid(pid) == os.getpgid(pid) == pid
    said(cli, "rm", "-f", "there")


@pytest.mark.parametrize("command", [PREFIX / "bin/ocirun", PREFIX / "lib/ocirun/ocirun"])
def test_a_shim_can_be_started_so_also_where_the_dump_is_stale(command: Path) -> None:
    """Who asks it how it is hears of no zygote, and it has outlived its starter by then."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        moved = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)]
        starter = os.posix_spawn(command, [command, "shim-on-fd-3"], os.environ, file_actions=moved)
        assert os.waitpid(starter, 0)[1] == 0
        theirs.close()
        send_frame(ours, protocol.request("hello"))
        received = recv_frame(ours)
        assert received is not None and protocol.parse_reply(received[0]) == {"pid": 0, "version": ""}
        assert recv_frame(ours) is None


def test_a_clock_that_began_later(cli: Node) -> None:
    """As after the machine was started again: CLOCK_MONOTONIC is behind where it was when the dump was made."""
    behind = -int(time.clock_gettime(time.CLOCK_BOOTTIME)) + 1
    clocks = ["unshare", "--time", "--fork", "--monotonic", str(behind), "--boottime", str(behind)]
    seen = []
    for command in (QUICK, SLOW):
        words = [*clocks, command, *cli.words[1:], "run", "--rm", cli.image, "echo", "ran"]
        done = subprocess.run(words, capture_output=True, timeout=COMMAND_S, check=False)
        seen.append((done.returncode, done.stdout, done.stderr))
    assert seen == [(0, b"ran\n", b"")] * 2


@pytest.mark.parametrize("unbuffered", [False, True])
def test_its_files_are_those_that_it_was_given(unbuffered: bool) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    seen = []
    for command in (QUICK, SLOW):
        rows: list[object] = []
        for redirection in (">&-", "2>&-", "<&-", ">/dev/full", ">/", "| :", ">&- 2>&-"):
            shell = ["bash", "-c", f'set -o pipefail; "$0" version {redirection}', command]
            done = subprocess.run(shell, env=environment, capture_output=True, stdin=subprocess.DEVNULL, check=False)
            rows.append((redirection, done.returncode, done.stdout, done.stderr.replace(bytes(command), b"ocid")))
        rows.append(_on_a_terminal(command, environment))
        seen.append(rows)
    assert seen[0] == seen[1]


def _on_a_terminal(command: Path, environment: Mapping[str, str], *words: str) -> bytes:
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(command, [command, *(words or ("version",))], environment)
    text = b""
    try:
        while more := os.read(fd, 4096):
            text += more
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(fd)
        assert os.waitpid(pid, 0)[1] == 0
    return text


# ---------------------------------------------------------------------------------------------------- when it is not


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tree, and a prefix with its command; the slow one only says so."""
    place = tmp_path_factory.mktemp("dump")
    for package in ("cri", "imagestore", "snapshotter", "runtime"):
        shutil.copytree(install.ROOT / package, place / "tree" / package)
    prefix = place / "prefix"
    site = prefix / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    site.mkdir(parents=True)
    (site / "all.pth").write_text(f"{place}/tree\n{sysconfig.get_path('purelib')}\n")
    (prefix / "bin").mkdir()
    (prefix / "bin/python").symlink_to(os.path.realpath(sys.executable))
    (prefix / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
    subprocess.run([prefix / "bin/python", "-P", "-m", "cri.install", prefix], check=True)
    slow = prefix / "lib/ocid/ocid"
    slow.write_text('#!/bin/sh\necho "slow $@"\n')
    return place / "tree", prefix / "bin/ocid"


def answer(command: Path, *words: str, **more: str) -> str:
    code, out, error = outcome(command, *words, env={**os.environ, **more})
    assert code == 0, error
    return out.decode().strip()


def test_a_file_that_changed_makes_it_stale(own: tuple[Path, Path]) -> None:
    tree, command = own
    library = command.parents[1] / "lib/ocid"
    for name in ("cri/cli/ps.py", "imagestore/model.py", "snapshotter/model.py", "runtime/linux/sockets.py"):
        source = tree / name
        status, whole = source.stat(), source.read_bytes()
        source.write_bytes(whole + b"\n")
        assert answer(command, "version") == "slow version" and made_of.stale(library) == f"{source} has changed"
        source.write_bytes(whole)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert answer(command, "version").startswith("ocid ") and made_of.stale(library) == ""


def test_another_processor_has_chosen_other_code(own: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a disk that has moved: what the dump says of the processor is another's."""
    _, command = own
    library = command.parents[1] / "lib/ocid"
    (made,) = library.glob("dump-*")
    whole, this = made.read_bytes(), processor().encode()
    assert len(this) == 192 and this in whole and processor().encode() == this
    try:
        made.write_bytes(whole.replace(this, this[::-1]))
        assert answer(command, "version") == "slow version"
    finally:
        made.write_bytes(whole)
    assert answer(command, "version").startswith("ocid ")
    monkeypatch.setattr(made_of, "processor", lambda: "another")
    assert made_of.stale(library) == "it was made for another processor"


@pytest.mark.parametrize(
    ("name", "value", "resumes"),
    [
        ("LANG", "", True),
        ("LANG", "C", True),
        ("LANG", "en_US.UTF-8", True),
        ("LC_ALL", "de_DE.utf8@euro", True),
        ("LC_CTYPE", "de_DE.ISO-8859-1", False),
        ("LC_ALL", "ja_JP.eucJP", False),
        ("PYTHONUNBUFFERED", "1", True),
        ("PYTHONDONTWRITEBYTECODE", "1", True),
        ("PYTHONPATH", "/nowhere", False),
        ("PYTHONWARNINGS", "error", False),
        ("PYTHONIOENCODING", "latin-1", False),
        ("COVERAGE_PROCESS_START", "x", False),
        ("LD_LIBRARY_PATH", "/nowhere", False),
        ("GRPC_ENABLE_FORK_SUPPORT", "1", False),
        ("TZ", "Asia/Tokyo", True),
    ],
)
def test_where_an_interpreter_would_start_otherwise_it_starts(
    own: tuple[Path, Path], name: str, value: str, resumes: bool
) -> None:
    others = dict.fromkeys(("LANG", "LC_ALL", "LC_CTYPE"), "")
    assert (answer(own[1], "version", **{**others, name: value}) != "slow version") is resumes


def _wanted(place: Path) -> Iterator[tuple[str, ...]]:
    for command in sorted(addresses.COMMANDS):
        yield (command,)
    yield from (("inspect", "docker://x.invalid/y"), ("inspect", "oci:/x"), ("pod", "play", "-"))
    missing, there = "x.invalid/y:1", place / "layout"
    for words in ((missing,), ("--pull", "always", missing), (f"oci:{there}",), ("--env-file", "/dev/null", missing)):
        yield ("run", "--rm", *words, "true")


def test_what_reads_bytes_of_others_lies_at_addresses_of_its_own(own: tuple[Path, Path], tmp_path: Path) -> None:
    """It starts once more, before anything was made of them: what starts here says what it was asked to."""
    (tmp_path / "layout").mkdir()
    shared = ("--root", str(tmp_path / "root"), "--state", str(tmp_path / "state"))
    for words in _wanted(tmp_path):
        assert answer(own[1], *shared, *words) == f"slow {' '.join((*shared, *words))}", words
    assert answer(own[1], "--state", "pull", "version").startswith("ocid ")  # a directory, not a command


def test_a_pull_is_no_resumed_process(own: tuple[Path, Path], cli: Node) -> None:
    """Nor is a run that has to fetch its image; through a daemon that does, it is one."""
    assert once(cli, "IMAGE", "true") == ""
    words = [*cli.words[1:], "run", "--rm", "--pull", "always", cli.image, "echo", "ran"]
    is_served = cli.process is not None
    expected: Callable[[str], bool] = (lambda out: out == "ran") if is_served else (lambda out: out.startswith("slow "))
    assert expected(answer(own[1], *words))


def test_signatures_are_read_by_no_resumed_process(own: tuple[Path, Path], cli: Node) -> None:
    """CreateContainer judges them for each container; without a daemon in the command's own process."""
    if cli.process is not None:
        return
    words = [*cli.words[1:], "run", "--rm", cli.image, "echo", "ran"]
    assert answer(own[1], *words) == "ran"
    for signatures, expected in (('[["simple", "c2lnbmVk"]]', "slow "), ("[]", "ran")):
        with contextlib.closing(sqlite3.connect(cli.root / "ocid.db")) as db, db:
            assert db.execute("UPDATE image_origin SET signatures = ?", (signatures,)).rowcount
        assert answer(own[1], *words).startswith(expected)


def test_a_run_starts_once_more_before_it_says_or_reads_anything(own: tuple[Path, Path], cli: Node) -> None:
    """Else it said twice that it pulls, and found a pipe at its end that it had read."""
    if cli.process is not None:
        return
    run = ("run", "--pull", "always", cli.image, "true")
    said_there = _on_a_terminal(own[1], dict(os.environ), *cli.words[1:], *run)
    assert said_there.startswith(b"slow ") and b"pulling" not in said_there
    shell = ["bash", "-c", '"$0" --config <(cat "$1") "${@:2}"', own[1], cli.words[2], *cli.words[3:], *run]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    assert done.stdout.startswith("slow --config /dev/fd/"), done.stderr


def test_what_commands_make_of_their_own_text_is_in_the_dump() -> None:
    """Options of each, functions of data classes, types of the configuration: made by none of them."""
    script = """
from cri.cli import addresses, main, resumed
from cri.config_read import _types, load
from runtime.linux import dataclass
import importlib
for name in set(main.COMMANDS) - addresses.COMMANDS: importlib.import_module(f"cri.cli.{name}")
resumed.prepare()
assert set(main._parsers) == set(main.COMMANDS) - addresses.COMMANDS and not dataclass._uncompiled
asked = _types.cache_info().misses
load()
assert _types.cache_info().misses == asked and _types.cache_info().hits
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=COMMAND_S)


def test_what_a_broken_off_installation_left_goes(tmp_path: Path) -> None:
    library = tmp_path / "lib/ocid"
    library.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (library / ".dump-0123456789abcdef.new").write_bytes(bytes(9))
    (library / "ocid").write_text("#!/bin/sh\n")
    with dump.locked(tmp_path, "ocid") as place:
        dump.put(None, tmp_path / "bin/ocid", place / "ocid")
    assert sorted(path.name for path in library.iterdir()) == ["lock", "ocid"]
