"""cri.apparmor: the profile goes to the parser, and what goes wrong there is said and no failure of the daemon."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from cri import apparmor
from cri.api import api_pb2 as pb
from cri.spec import confine


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (apparmor, confine.security):
        monkeypatch.setattr(module, "apparmor_enabled", lambda: True)


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


def test_one_that_is_loaded_already_is_left_alone(tmp_path: Path, on: None) -> None:
    profiles = tmp_path / "profiles"
    profiles.write_text("other (enforce)\nocid-default (enforce)\n")
    assert apparmor.ensure_default(parser(tmp_path, f"touch {tmp_path}/mark"), str(profiles))
    assert not (tmp_path / "mark").exists()
    for text in ("other (enforce)\nocid-default-other (enforce)\n", None):
        profiles.unlink() if text is None else profiles.write_text(text)
        assert apparmor.ensure_default(parser(tmp_path, f"cat > {tmp_path}/said"), str(profiles))
        assert (tmp_path / "said").read_text() == apparmor.PROFILE
        (tmp_path / "said").unlink()


@pytest.mark.parametrize(
    ("context", "loaded", "profile"),
    [
        ({}, True, "ocid-default"),
        ({}, False, ""),
        ({"privileged": True}, True, ""),
        ({"apparmor": {"profile_type": pb.SecurityProfile.Unconfined}}, True, ""),
        ({"apparmor": {"profile_type": pb.SecurityProfile.RuntimeDefault}}, False, "ocid-default"),
        ({"apparmor_profile": "unconfined"}, True, ""),
        ({"apparmor_profile": "runtime/default"}, False, "ocid-default"),
        ({"apparmor_profile": "localhost/mine"}, True, "mine"),
        ({"apparmor_profile": "localhost/mine", "privileged": True}, True, "mine"),
    ],
)
def test_who_names_no_profile_has_the_default_one_where_it_is_loaded(
    on: None, context: dict[str, Any], loaded: bool, profile: str
) -> None:
    asked = pb.LinuxContainerSecurityContext(**context)
    assert confine.apparmor("security_context", asked, default=loaded) == profile


def test_nobody_has_a_profile_without_apparmor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine.security, "apparmor_enabled", lambda: False)
    assert confine.apparmor("security_context", pb.LinuxContainerSecurityContext(), default=True) == ""
