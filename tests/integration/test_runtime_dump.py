"""`ocirun` as a program that goes on from a dump: like one that was started, and never from a dump that is not true."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import dump, install, made_of
from tests.bundles import Bundles, awaited, bundles
from tests.support import eventually, needs

PREFIX = Path(sys.prefix)
QUICK, SLOW = PREFIX / "bin/ocirun", PREFIX / "lib/ocirun/ocirun"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root")
    with bundles(tmp_path) as opened:
        yield opened


def said(*words: str | bytes | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(words, env=env, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return (done.stdout + done.stderr).decode(errors="surrogateescape")


def dumps(library: Path) -> list[Path]:
    return list(library.glob("dump-*"))


# ---------------------------------------------------------------------------------------------------- as if started


def test_the_command_is_a_launcher_of_a_dump() -> None:
    """Not pip's entry point, which hack/setup writes over, and not the slow command."""
    (made,) = dumps(SLOW.parent)
    data = QUICK.read_bytes()
    assert data[:4] == b"\x7fELF" and os.fsencode(made) in data and os.fsencode(SLOW) in data
    assert SLOW.read_text().startswith("#!/bin/sh\n")


@pytest.mark.parametrize("ignored", [(), (signal.SIGINT, signal.SIGHUP)])
def test_a_resumed_process_is_like_a_started_one(home: Bundles, ignored: tuple[int, ...]) -> None:
    """Itself and its container, as the kernel knows them: signals, descriptors, personality, limits, the exe file."""
    seen = []
    for command in (QUICK, SLOW):
        bundle = home.make()
        bundle.write()
        words = [command, *home.command("run", "--bundle", str(bundle.path), bundle.id)[1:]]

        def ignore() -> None:
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)

        null = subprocess.DEVNULL
        with awaited(subprocess.Popen(words, stdin=null, stdout=null, stderr=null, preexec_fn=ignore)) as process:
            try:
                eventually((home.root / bundle.id / "state.json").exists, what="the container")
                bundle.becomes("running")
                both = process.pid, bundle.pid()
                seen.append((*map(_known, both), *map(_is_dumped, both)))
            finally:
                bundle.delete()
            assert process.wait() == 137
    (quick, inside, *dumped), (slow, inside_slow, *not_dumped) = seen
    assert quick == slow and inside == inside_slow
    assert dumped == [True, False] and not_dumped == [False, False]
    assert quick["exe"] == "/memfd:ocid-no-interpreter (deleted)"
    assert inside["personality"] == "00000000"


def _known(pid: int) -> dict[str, object]:
    place = Path(f"/proc/{pid}")
    lines = [line.partition(":\t") for line in (place / "status").read_text().splitlines()]
    status = {name: value for name, _, value in lines}
    names = (
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "NoNewPrivs",
        "Seccomp",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "CapEff",
        "Threads",
    )
    return {
        **{name: status[name] for name in names},
        "comm": (place / "comm").read_text(),
        "exe": os.readlink(place / "exe"),
        "fds": sorted(os.listdir(place / "fd")),
        "limits": (place / "limits").read_text(),
        "personality": (place / "personality").read_text().strip(),
    }


def _is_dumped(pid: int) -> bool:
    return str(SLOW.parent / "dump-") in Path(f"/proc/{pid}/maps").read_text()


def test_words_come_as_they_were_given(home: Bundles) -> None:
    bundle = home.make().up()
    words = [b"", b"a b", b"\xff\xfe", b"new\nline", "ü€".encode(), b"x" * 100_000]
    command = [os.fsencode(word) for word in home.command("exec", bundle.id, "printf", "%s|")]
    done = subprocess.run([*command, *words], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert done.stdout == b"|".join([*words, b""])


def test_the_environment_is_the_callers(home: Bundles, tmp_path: Path) -> None:
    """A hook without one of its own has ocirun's: of two with one name the first, as in an interpreter that starts."""
    out = tmp_path / "environment"
    bundle = home.make()
    bundle.config["hooks"] = {"poststop": [{"path": "/bin/sh", "args": ["sh", "-c", f"env -0 > {out}"]}]}
    bundle.up()
    end = [os.fsencode(word) for word in (QUICK, *home.command("delete", "--force", bundle.id)[1:])]
    pid = os.fork()
    if pid == 0:
        _execve(end, [b"ONE=1", b"EMPTY=", b"BYTES=\xff", b"TWICE=first", b"TWICE=second", b"EQUAL=a=b", b"none"])
    assert os.waitpid(pid, 0)[1] == 0
    seen = {line for line in out.read_bytes().split(b"\0") if not line.startswith((b"PWD=", b"_=", b"SHLVL="))}
    assert seen == {b"", b"ONE=1", b"EMPTY=", b"BYTES=\xff", b"TWICE=first", b"EQUAL=a=b"}


def _execve(words: list[bytes], environment: list[bytes]) -> None:
    """execve(2) with an environment that os.execve would not take."""
    import ctypes

    arguments = (ctypes.c_char_p * (len(words) + 1))(*words, None)
    pairs = (ctypes.c_char_p * (len(environment) + 1))(*environment, None)
    ctypes.CDLL(None).execve(words[0], arguments, pairs)
    os._exit(99)


def test_its_heap_grows(home: Bundles) -> None:
    """brk(2) goes on where this kernel has it, not where that of the dumped process was."""
    bundle = home.make()
    bundle.config["annotations"] = {f"key-{number}": "v" * (number % 1000) for number in range(20_000)}
    bundle.up()
    assert bundle.state()["annotations"] == bundle.config["annotations"]


def test_an_ordinary_user_has_it_too(tmp_path: Path) -> None:
    needs("root")
    words = [QUICK, "spec", "--rootless", "--bundle", tmp_path]
    tmp_path.chmod(0o777)
    for above in [
        path for path in tmp_path.parents if path.stat().st_uid == 0 and path.stat().st_mode & 0o777 == 0o700
    ]:
        above.chmod(0o711)
    subprocess.run(words, user=65534, group=65534, extra_groups=(), check=True)
    assert json.loads((tmp_path / "config.json").read_text())["linux"]["uidMappings"]


# ---------------------------------------------------------------------------------------------------- when it is not


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tree of its own, and a prefix with its command; the slow one only says so."""
    place = tmp_path_factory.mktemp("dump")
    shutil.copytree(install.ROOT / "runtime", place / "tree/runtime", ignore=shutil.ignore_patterns("__pycache__"))
    words = [sys.executable, "-m", "runtime.install", place / "prefix"]
    subprocess.run(words, cwd=place / "tree", env={**os.environ, "PYTHONPATH": str(place / "tree")}, check=True)
    slow = place / "prefix/lib/ocirun/ocirun"
    slow.write_text('#!/bin/sh\necho "slow $@"\n')
    return place / "tree", place / "prefix"


def test_files_that_are_those_of_the_dump_are_not_read_again(installed: tuple[Path, Path]) -> None:
    assert said(installed[1] / "bin/ocirun", "--version").startswith("ocirun version")


def test_a_file_that_changed_makes_it_stale(installed: tuple[Path, Path]) -> None:
    tree, prefix = installed
    source = tree / "runtime/options.py"
    status = source.stat()
    changes = (
        lambda: os.utime(source, ns=(1, 1)),
        lambda: source.write_text(source.read_text() + "\n"),
        lambda: source.rename(f"{source}.away"),
    )
    whole = source.read_bytes()
    for change in changes:
        change()
        assert said(prefix / "bin/ocirun", "state", "a b") == "slow state a b\n"
        Path(f"{source}.away").unlink(missing_ok=True)
        source.write_bytes(whole)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert said(prefix / "bin/ocirun", "--version").startswith("ocirun version")


def test_others_can_tell_that_it_is_stale_and_a_new_one_is_made_then(installed: tuple[Path, Path]) -> None:
    """As one whole: commands that start meanwhile find the old command or the new one, and the old dump goes."""
    tree, prefix = installed
    library, command = prefix / "lib/ocirun", prefix / "bin/ocirun"
    source = tree / "runtime/options.py"
    words = [sys.executable, "-m", "runtime.install", "--if-stale", prefix]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    slow = (library / "ocirun").read_bytes()
    assert made_of.stale(library) == ""
    subprocess.run(words, cwd=tree, env=environment, check=True)
    assert (library / "ocirun").read_bytes() == slow  # it was not: nothing is written
    (old,) = dumps(library)
    source.write_text(source.read_text() + "\n")
    assert made_of.stale(library) == f"{source} has changed"
    assert said(command, "list") == "slow list\n"
    with subprocess.Popen(words, cwd=tree, env=environment) as process:
        while process.poll() is None:
            assert said(command, "--version").startswith(("ocirun version", "slow"))
            select.select([], [], [], 0.005)
    assert process.returncode == 0 and made_of.stale(library) == ""
    (library / "ocirun").write_bytes(slow)
    assert said(command, "--version").startswith("ocirun version")
    (made,) = dumps(library)
    assert made != old
    away = made.rename(made.with_name("away"))
    assert made_of.stale(library) == f"{made} is gone"
    away.rename(made)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "unreadable place"])
def test_a_dump_that_is_not_whole_is_not_resumed(installed: tuple[Path, Path], damage: str) -> None:
    _, prefix = installed
    (made,) = dumps(prefix / "lib/ocirun")
    away = made.with_name("away")
    made.rename(away)
    try:
        size = away.stat().st_size
        if damage == "unreadable place":
            made.mkdir()
        elif damage != "missing":
            shutil.copy(away, made)
            os.truncate(made, {"empty": 0, "cut": size - 4096, "longer": size + 4096}[damage])
        assert said(prefix / "bin/ocirun", "list") == "slow list\n"
    finally:
        made.rmdir() if made.is_dir() else made.unlink(missing_ok=True)
        away.rename(made)


def test_an_address_that_is_taken_is_not_mapped_over(installed: tuple[Path, Path]) -> None:
    """Without randomized addresses the stack is where the dumped process had its first one."""
    assert said("setarch", "--addr-no-randomize", installed[1] / "bin/ocirun", "list") == "slow list\n"


def test_without_either_it_says_so(installed: tuple[Path, Path]) -> None:
    _, prefix = installed
    library, away = prefix / "lib/ocirun", prefix / "lib/away"
    library.rename(away)
    try:
        done = subprocess.run([prefix / "bin/ocirun", "list"], capture_output=True, check=False, text=True)
        assert (done.returncode, done.stderr) == (127, f"ocirun: cannot execute {library}/ocirun\n")
    finally:
        away.rename(library)


def test_where_no_dump_can_be_made_the_command_is_the_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose seccomp profile refuses personality(2)."""
    refusing = tmp_path / "setarch"
    refusing.write_text("#!/bin/sh\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(dump, "_SETARCH", (f"{tmp_path}/nothing",))
    assert dump.make(SLOW, ["runtime.cli"]) is None
    monkeypatch.setattr(dump, "_SETARCH", (str(refusing),))
    assert install.main([str(tmp_path / "prefix")]) == 0
    command = tmp_path / "prefix/bin/ocirun"
    assert command.read_bytes() == (tmp_path / "prefix/lib/ocirun/ocirun").read_bytes()
    assert not dumps(tmp_path / "prefix/lib/ocirun") and made_of.stale(tmp_path / "prefix/lib/ocirun") == ""
    assert said(command, "--version").startswith("ocirun version")
