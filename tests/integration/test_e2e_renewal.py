"""A daemon, and a doctor, of an installation whose commands have lost their dumps: there are new ones afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.leaks import Machine
from runtime import install, made_of
from tests.e2e import Node, retired
from tests.support import eventually, needs


class Installed(Node):
    """A node whose `ocid` is of a prefix of its own, with the packages of this one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.prefix = directory / "prefix"
        self.library = self.prefix / "lib/ocirun"
        site = self.prefix / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        site.mkdir(parents=True)
        (site / "all.pth").write_text(f"{install.ROOT}\n{sysconfig.get_path('purelib')}\n")
        (self.prefix / "bin").mkdir()
        (self.prefix / "bin/python").symlink_to(os.path.realpath(sys.executable))
        (self.prefix / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
        self._run("-X", "no_debug_ranges", "-m", "runtime.install", str(self.prefix))  # as hack/setup does

    def _run(self, *words: str, code: int = 0) -> str:
        done = subprocess.run([self.prefix / "bin/python", *words], capture_output=True, text=True, check=False)
        assert done.returncode == code, done
        return done.stdout

    @property
    def words(self) -> list[str]:
        return [str(self.prefix / "bin/python"), "-m", "cri.cli.main", *super().words[1:]]

    def doctor(self, *words: str, code: int = 0) -> list[dict[str, str]]:
        told = json.loads(self._run(*self.words[1:], "doctor", "--format", "json", *words, code=code))
        return [one for one in told["left"] if one["kind"] == "command"]

    def lose(self) -> Path:
        (made,) = self.library.glob("dump-*")
        made.rename(self.prefix / made.name)
        return made

    def find_again(self, lost: Path) -> None:
        """What is no matter of the test needs no new dump, which takes seconds of a processor."""
        (self.prefix / lost.name).rename(lost)
        assert self.is_whole()

    def is_whole(self) -> bool:
        return not made_of.stale(self.library) and len(list(self.library.glob("dump-*"))) == 1


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    needs("root", "overlay")
    before = Machine.now()
    made = Installed(tmp_path_factory.mktemp("n"))
    try:
        yield made
    finally:
        made.end()
        retired(made, before)


def test_a_daemon_that_starts_renews_it_beside_its_work(installed: Installed) -> None:
    made = installed.lose()
    compiled = (installed.library / "modules").stat()
    installed.start(as_child=True)
    try:
        eventually(installed.is_whole, what="a new dump")
        assert (installed.library / "modules").stat().st_ino == compiled.st_ino  # it was right, and is kept
    finally:
        installed.end()
    assert f"ocirun starts slowly: {made} is gone; it is installed anew" in installed.log.read_text()


def test_a_daemon_that_cannot_says_so_and_serves(installed: Installed) -> None:
    lost = installed.lose()
    (installed.library / "lock").rename(installed.library / "away")
    (installed.library / "lock").mkdir()  # root may write anywhere: what it cannot do is open this
    try:
        installed.start(as_child=True)
        eventually(lambda: "ocirun still starts slowly: its installation ended with 1" in installed.log.read_text())
        assert installed.client.version()[0] == "ocid"
        installed.end()
        assert made_of.stale(installed.library)
    finally:
        (installed.library / "lock").rmdir()
        (installed.library / "away").rename(installed.library / "lock")
        installed.find_again(lost)


def test_a_daemon_that_ends_meanwhile_takes_it_along(installed: Installed) -> None:
    hanging = installed.prefix / "lib/hanging"
    lost = installed.lose()
    os.mkfifo(hanging)
    (installed.library / "lock").unlink()
    (installed.library / "lock").symlink_to(hanging)  # a fifo that nobody reads: to open it takes for ever
    try:
        installed.start(as_child=True)
        eventually(lambda: "it is installed anew" in installed.log.read_text())
        eventually(lambda: _installing(installed.prefix), what="the installation")
        installed.end()
        assert not _installing(installed.prefix)
    finally:
        (installed.library / "lock").unlink()
        hanging.unlink()
        installed.find_again(lost)


def _installing(prefix: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"--if-stale" in words and os.fsencode(prefix) in words:
                found.append(entry.name)
    return found


def test_the_doctor_tells_and_repairs(installed: Installed) -> None:
    assert installed.doctor() == []
    made = installed.lose()
    (told,) = installed.doctor(code=1)
    assert told["what"] == f"starts slowly: {made} is gone"
    assert installed.doctor("--repair") == [] and installed.is_whole()


def test_the_same_of_ocid(installed: Installed) -> None:
    assert not installed.prefix.joinpath("lib/ocid").exists()  # nothing to tell, where there was none
    installed._run("-m", "cri.install", str(installed.prefix))
    library = installed.prefix / "lib/ocid"
    try:
        assert installed.doctor() == []
        (made,) = library.glob("dump-*")
        made.unlink()
        (told,) = installed.doctor(code=1)
        assert (told["name"], told["what"]) == (f"{library}/ocid", f"starts slowly: {made} is gone")
        assert installed.doctor("--repair") == [] and not made_of.stale(library)
        (made,) = library.glob("dump-*")
        made.unlink()
        installed.start(as_child=True)
        eventually(lambda: not made_of.stale(library), what="a new dump")
        assert f"ocid starts slowly: {made} is gone; it is installed anew" in installed.log.read_text()
    finally:
        installed.end()
        shutil.rmtree(library)
