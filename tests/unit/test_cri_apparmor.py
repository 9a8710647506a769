"""cri.apparmor: the profile goes to the parser, and what goes wrong there is said and no failure of the daemon."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cri import apparmor


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "apparmor_enabled", lambda: True)


def parser(directory: Path, script: str) -> str:
    path = directory / "parser"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_apparmor_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "apparmor_enabled", lambda: False)
    assert not apparmor.load_default(parser(tmp_path, f"touch {tmp_path}/mark"))
    assert not (tmp_path / "mark").exists()


def test_the_parser_is_given_the_profile(tmp_path: Path, on: None) -> None:
    assert apparmor.load_default(parser(tmp_path, f'echo "$@" > {tmp_path}/words; cat > {tmp_path}/said'))
    assert (tmp_path / "said").read_text() == apparmor.PROFILE
    assert (tmp_path / "words").read_text() == "-K -r\n"


@pytest.mark.parametrize(("script", "says"), [("cat > /dev/null; exit 3", "ended with 3"), (None, "there is no")])
def test_a_profile_that_cannot_be_loaded_is_a_warning(
    tmp_path: Path, on: None, caplog: pytest.LogCaptureFixture, script: str | None, says: str
) -> None:
    path = parser(tmp_path, script) if script else str(tmp_path / "none")
    with caplog.at_level(logging.WARNING):
        assert not apparmor.load_default(path)
    assert says in caplog.text
