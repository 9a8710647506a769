"""checkpoint and restore around criu: what is refused, what criu is asked for, and what a criu that fails leaves.

The real criu is in tests/vm/test_checkpoint.py: Debian's does not know every kernel.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import Bundle, Bundles, Result, bundles
from tests.support import needs

CLONE = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


@dataclass
class Fake:
    """tests/fakes/criu.py as a program."""

    directory: Path

    @property
    def program(self) -> Path:
        return self.directory / "criu"

    def plan(self, what: str) -> Fake:
        (self.directory / "plan").write_text(what)
        return self

    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "options").read_text())
        return found


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    made = Fake(tmp_path / "criu")
    made.directory.mkdir()
    made.program.write_text(
        f'#!/bin/sh\ncd {CLONE} && exec {sys.executable} -m tests.fakes.criu {made.directory} "$@"\n'
    )
    made.program.chmod(0o755)
    return made.plan("ok")


def _checkpoint(bundle: Bundle, program: Path | str, *flags: str) -> Result:
    where = ("--image-path", str(bundle.path / "images"))
    return bundle.home.ocirun("--criu", str(program), "checkpoint", *flags, *where, bundle.id)


def _restore(bundle: Bundle, program: Path | str, *flags: str) -> Result:
    bundle.write()
    where = ("--bundle", str(bundle.path), "--image-path", str(bundle.path / "images"))
    return bundle.home.ocirun("--criu", str(program), "restore", "--detach", *flags, *where, bundle.id)


def _images(bundle: Bundle, descriptors: object = ("/dev/null", "pipe:[1]", "pipe:[2]")) -> None:
    (bundle.path / "images").mkdir(exist_ok=True)
    (bundle.path / "images/descriptors.json").write_text(json.dumps(descriptors))


def test_without_criu_it_says_what_to_install(home: Bundles) -> None:
    bundle = home.make().up()
    said = _checkpoint(bundle, "no-such-criu").failed('exec: "no-such-criu": executable file not found in $PATH')
    assert "Debian's package criu" in said
    assert bundle.status() == "running"


def test_only_a_running_container_is_checkpointed(home: Bundles, fake: Fake) -> None:
    bundle = home.make()
    bundle.create().ok()
    _checkpoint(bundle, fake.program).failed("Container cannot be checkpointed in created state")
    bundle.start().ok()
    home.ocirun("kill", bundle.id, "KILL").ok()
    bundle.becomes("stopped")
    _checkpoint(bundle, fake.program).failed("Container cannot be checkpointed in stopped state")
    home.ocirun("checkpoint", "unknown").failed("container does not exist")


def test_criu_is_asked_for_what_the_flags_say(home: Bundles, fake: Fake) -> None:
    bundle = home.make().up()
    pid = bundle.pid()
    work = bundle.path / "work"
    flags = ("--tcp-established", "--file-locks", "--shell-job", "--ext-unix-sk", "--auto-dedup", "--leave-running")
    _checkpoint(bundle, fake.program, *flags, "--empty-ns", "network", "--work-path", str(work)).ok()
    found = fake.options()
    # By criu's images/rpc.proto: pid, leave_running, ext_unix_sk, tcp_established, shell_job, file_locks.
    assert [found[number] for number in "234578"] == [pid, 1, 1, 1, 1, 1]
    assert found["13"] == str(bundle.rootfs)
    assert (found["16"], found["38"], found["50"]) == (1, 0x40000000, 1)
    assert bundle.id in found["44"]  # the cgroup to freeze it by
    assert (work.is_dir(), bundle.status()) == (True, "running")
    assert (work.stat().st_mode & 0o777, (bundle.path / "images").stat().st_mode & 0o777) == (0o700, 0o700)


def test_what_is_checkpointed_is_gone(home: Bundles, fake: Fake) -> None:
    bundle = home.make().up()
    _checkpoint(bundle, fake.program).ok()
    bundle.gone()
    home.ocirun("state", bundle.id).failed("container does not exist")


@pytest.mark.parametrize(
    ("plan", "said"), [("fail", "criu failed: type DUMP errno 22: first: cause"), ("die", "ended without an answer")]
)
def test_a_failed_dump_leaves_the_container_as_it_was(home: Bundles, fake: Fake, plan: str, said: str) -> None:
    bundle = home.make().up()
    pid = bundle.pid()
    text = _checkpoint(bundle, fake.plan(plan).program).failed(said)
    log = bundle.path / "images/dump.log"
    assert (f"log file: {log}" in text) == log.exists() == (plan == "fail")
    assert (bundle.status(), bundle.pid()) == ("running", pid)


def test_s60_an_annotation_gives_criu_no_configuration(home: Bundles, fake: Fake) -> None:
    bundle = home.make()
    bundle.config["annotations"] = {"org.criu.config": "/tmp/of-the-image"}
    bundle.up()
    _checkpoint(bundle, fake.program).ok()
    assert fake.options()["51"] == "/etc/criu/runc.conf"


@pytest.mark.parametrize("plan", ["fail", "die"])
def test_a_failed_restore_leaves_nothing(home: Bundles, fake: Fake, plan: str) -> None:
    bundle = home.make()
    _images(bundle)
    _restore(bundle, fake.plan(plan).program).failed("criu failed: type RESTORE")
    bundle.gone()


def test_s71_a_process_of_the_host_is_no_container(home: Bundles, fake: Fake) -> None:
    bundle = home.make()
    _images(bundle)
    _restore(bundle, fake.plan("outside").program).failed("is in the host's mount namespace")
    bundle.gone()
    assert not Path("/proc", (fake.directory / "pid").read_text()).exists()
    assert not (fake.directory / "let-go").exists()


@pytest.mark.parametrize("descriptors", [{}, ["a"] * 4, [1], "pipe:[1]"])
def test_s71_descriptors_are_three_names_at_most(home: Bundles, fake: Fake, descriptors: object) -> None:
    bundle = home.make()
    _images(bundle, descriptors)
    _restore(bundle, fake.program).failed("descriptors.json: expected up to three strings")
    bundle.gone()


def test_s71_descriptors_are_read_to_a_limit(home: Bundles, fake: Fake) -> None:
    bundle = home.make()
    _images(bundle)
    with open(bundle.path / "images/descriptors.json", "w") as file:
        file.truncate(1 << 30)
    _restore(bundle, fake.program).failed("descriptors.json")
    (bundle.path / "images/descriptors.json").unlink()
    os.mkfifo(bundle.path / "images/descriptors.json")
    _restore(bundle, fake.program).failed("descriptors.json")
    shutil.rmtree(bundle.path / "images")
    _restore(bundle, fake.program).failed("descriptors.json")
    bundle.gone()


def test_an_id_that_is_taken_is_not_restored_over(home: Bundles, fake: Fake) -> None:
    bundle = home.make().up()
    _images(bundle)
    _restore(bundle, fake.program).failed("container with id exists")
    assert bundle.status() == "running"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--manage-cgroups-mode", "hard"), "Invalid manage-cgroups-mode value"),
        (("--empty-ns", "pid"), "namespace pid is not supported"),
        (("--parent-path", "/abs"), "--parent-path must be relative"),
        (("--parent-path", "../none"), "invalid --parent-path"),
        (("--page-server", "here"), "Use --page-server ADDRESS:PORT"),
        (("--page-server", "here:there"), "Invalid port number"),
    ],
)
def test_flags_are_checked_before_anything_is_done(
    home: Bundles, fake: Fake, flags: tuple[str, ...], said: str
) -> None:
    bundle = home.make().up()
    _checkpoint(bundle, fake.program, *flags).failed(said)
    assert not (fake.directory / "options").exists()
    assert bundle.status() == "running"


def test_stdio_on_null_is_the_containers_own(home: Bundles) -> None:
    """An fd on a mount of the host's cannot be checkpointed."""
    bundle = home.sh("stat -c %m.%d /dev/null /proc/self/fd/0 > /tmp/seen; exec sleep 1000")
    bundle.create(stdin=-3).ok()
    bundle.start().ok()
    pid = bundle.pid()
    inside = os.stat(f"/proc/{pid}/root/dev/null")
    held = os.stat(f"/proc/{pid}/fd/0")
    assert (held.st_dev, held.st_ino) == (inside.st_dev, inside.st_ino) != (os.stat("/dev/null").st_dev, 0)
