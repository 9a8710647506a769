"""Logins on this machine: which entry is for which host, what helpers and providers may say, and what no error says."""

from __future__ import annotations

import base64
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imagestore.errands import Errand
from imagestore.keyring import AUTH_FILES, Keyring, KeyringConfig, matches, usual_files
from imagestore.model import Credentials, ImageError
from imagestore.programs import ask, find
from imagestore.providers import read_providers
from tests.support import SOON_S, eventually

SECRET = "hunter2!"


def encoded(user: str, password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def ring(tmp_path: Path, *documents: object, **more: Any) -> Keyring:
    files = []
    for number, document in enumerate(documents):
        files.append(tmp_path / f"auth{number}.json")
        files[-1].write_text(document if isinstance(document, str) else json.dumps(document))
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    return Keyring(KeyringConfig(tuple(files), environment=environment, **more))


def program(tmp_path: Path, name: str, script: str) -> Path:
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def users(found: Credentials | None) -> str:
    return found.username if found else ""


# --------------------------------------------------------------------------------------------------------------- files


def test_the_longest_namespace_wins(tmp_path: Path) -> None:
    keys = ("reg.example", "reg.example/team", "reg.example/team/app", "reg.example:5000")
    keyring = ring(tmp_path, {"auths": {key: encoded(key.replace(":", "-")) for key in keys}})
    assert users(keyring.find("reg.example", "team/app")) == "reg.example/team/app"
    assert users(keyring.find("reg.example", "team/apple")) == "reg.example/team"
    assert users(keyring.find("reg.example", "teams/app")) == "reg.example"
    assert users(keyring.find("reg.example:5000", "team/app")) == "reg.example-5000"
    assert keyring.find("other.example", "team/app") is None
    assert keyring.find("reg.example:443", "team/app") is None


@pytest.mark.parametrize(
    ("key", "domain", "path", "fits"),
    [
        ("https://index.docker.io/v1/", "docker.io", "library/busybox", True),
        ("registry-1.docker.io", "docker.io", "library/busybox", True),
        ("https://reg.example/v2/", "reg.example", "a", True),
        ("http://reg.example", "reg.example", "a", True),
        ("https://reg.example/team", "reg.example", "team/a", True),
        ("https://reg.example/team", "reg.example", "teams/a", False),
        ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com", "a", True),
        ("*.example", "reg.example", "a", True),
        ("*.example", "a.reg.example", "a", False),
        ("*.example", "example", "a", False),
        ("*", "reg.example", "a", False),
        ("reg?example", "reg.example", "a", False),
        ("[r]eg.example", "reg.example", "a", False),
        ("*.example:5000", "reg.example:5000", "a", True),
        ("*.example", "reg.example:5000", "a", False),
        ("[::1]:5000", "[::1]:5000", "a", True),
        ("reg.example.evil", "reg.example", "a", False),
        ("evil-reg.example", "reg.example", "a", False),
    ],
)
def test_s27_which_host_a_key_names(key: str, domain: str, path: str, fits: bool) -> None:
    assert matches(key, domain, path) is fits


def test_entries_of_every_kind(tmp_path: Path) -> None:
    keyring = ring(
        tmp_path,
        {
            "auths": {
                "a.example": {"username": "anna", "password": SECRET},
                "b.example": {"identitytoken": "id"},
                "c.example": {"registrytoken": "reg"},
                "d.example": {},
                "e.example": {**encoded("eve", SECRET + "\0\0"), "email": "ignored"},
            }
        },
        {"auths": {"d.example": encoded("second file")}},
    )
    assert keyring.find("a.example", "x") == Credentials("anna", SECRET)
    assert keyring.find("b.example", "x") == Credentials(identity_token="id")
    assert keyring.find("c.example", "x") == Credentials(registry_token="reg")
    assert users(keyring.find("d.example", "x")) == "second file"
    assert keyring.find("e.example", "x") == Credentials("eve", SECRET)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"auths": {"r.example": {"auth": SECRET}}}),
        json.dumps({"auths": {"r.example": {"auth": base64.b64encode(SECRET.encode()).decode()}}}),
        '{"auths": {"r.example": {"auth": "' + SECRET + '" "}}}',
        '{"auths": {"r.example": {"auth": "' + SECRET,
        "[" * 100_000,
        json.dumps([SECRET]),
    ],
)
def test_s30_bad_files_are_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    with pytest.raises(ImageError) as error:
        ring(tmp_path, text).find("r.example", "x")
    assert "auth0.json" in str(error.value)
    told = f"{error.value} {error.value.__cause__}"
    assert SECRET not in told and base64.b64encode(SECRET.encode()).decode() not in told


def test_a_bad_entry_of_another_host_does_no_harm(tmp_path: Path) -> None:
    keyring = ring(tmp_path, {"auths": {"bad.example": {"auth": "%%%"}, "good.example": encoded("anna")}})
    assert users(keyring.find("good.example", "x")) == "anna"


def test_missing_and_empty_files(tmp_path: Path) -> None:
    assert Keyring(KeyringConfig((tmp_path / "none", Path("/dev/null")))).find("r.example", "x") is None


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="fifo"):
        Keyring(KeyringConfig((tmp_path / "fifo",))).find("r.example", "x")


def test_where_others_put_theirs() -> None:
    assert [str(path) for path in usual_files({"HOME": "/h", "XDG_RUNTIME_DIR": "/run/user/7"})] == [
        "/run/user/7/containers/auth.json",
        "/h/.config/containers/auth.json",
        "/h/.docker/config.json",
    ]
    assert usual_files({"REGISTRY_AUTH_FILE": "/x"}) == (Path("/x"),)
    assert usual_files({"HOME": "/h", "DOCKER_CONFIG": "/d"})[2] == Path("/d/config.json")
    assert "password" not in repr(KeyringConfig(environment={"SECRET": "password"}))


# ------------------------------------------------------------------------------------------------------------- helpers


def test_helper_of_a_host_and_of_all(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    for name in ("one", "all"):
        program(
            tmp_path,
            f"docker-credential-{name}",
            f'read server; echo "$1 $server" >>{asked}; printf \'{{"Username":"{name}","Secret":"%s"}}\' s3cret',
        )
    keyring = ring(
        tmp_path,
        {"credHelpers": {"one.example": "one"}, "credsStore": "all", "auths": {"plain.example": encoded("plain")}},
    )
    assert keyring.find("one.example", "x") == Credentials("one", "s3cret")
    assert keyring.find("plain.example", "x") == Credentials("plain", SECRET)
    assert keyring.find("docker.io", "library/x") == Credentials("all", "s3cret")
    assert asked.read_text().splitlines() == ["get one.example", "get https://index.docker.io/v1/"]


def test_helpers_of_registries_conf(tmp_path: Path) -> None:
    """In their order, by the registry's name alone; the files are where they stand among them."""
    program(tmp_path, "docker-credential-one", 'read s; echo \'{"Username":"\'$s\'","Secret":"s"}\'')
    program(tmp_path, "docker-credential-none", "echo credentials not found in native keychain; exit 1")
    keyring = ring(tmp_path, {"auths": {"r.example": encoded("file")}})

    def who(domain: str, *helpers: str) -> str:
        return users(keyring.find(domain, "team/app", None, helpers))

    assert who("r.example") == "file" and who("other.example") == ""
    assert who("r.example", "none", "one", AUTH_FILES) == "r.example"
    assert who("r.example", "none", AUTH_FILES, "one") == "file"
    assert who("other.example", AUTH_FILES, "one") == "other.example"
    assert who("r.example", "none") == ""
    with pytest.raises(ImageError, match="docker-credential-absent: not found"):
        who("r.example", "absent")


def test_helper_with_an_identity_token(tmp_path: Path) -> None:
    program(tmp_path, "docker-credential-h", 'echo \'{"Username":"<token>","Secret":"idtok"}\'')
    keyring = ring(tmp_path, {"credHelpers": {"r.example": "h"}})
    assert keyring.find("r.example", "x") == Credentials(identity_token="idtok")


def test_helper_without_an_entry_is_no_failure(tmp_path: Path) -> None:
    program(tmp_path, "docker-credential-h", "echo credentials not found in native keychain; exit 1")
    assert ring(tmp_path, {"credsStore": "h"}).find("r.example", "x") is None


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (f"echo {SECRET}; echo {SECRET} >&2; exit 3", "exit code 3"),
        (f"echo {SECRET}", "no JSON"),
        (f'echo \'{{"Username":"{SECRET}","Secret":7}}\'', "no JSON"),
        ("exec /usr/bin/yes", "more than 262144 bytes"),
        ("kill -9 $$", "exit code -9"),
    ],
)
def test_s30_helpers_that_fail_are_not_quoted(tmp_path: Path, script: str, says: str) -> None:
    program(tmp_path, "docker-credential-h", script)
    with pytest.raises(ImageError, match=says) as error:
        ring(tmp_path, {"credHelpers": {"r.example": "h"}}).find("r.example", "x")
    assert SECRET not in f"{error.value} {error.value.__cause__} {error.value.__context__}"


@pytest.mark.parametrize("name", ["../h", "/bin/sh", "", "a b", "h\n", ".", "h\0"])
def test_helper_names_are_no_paths(tmp_path: Path, name: str) -> None:
    program(tmp_path, "docker-credential-h", "echo never")
    with pytest.raises(ImageError):
        find(name, (str(tmp_path / "bin"),))


def test_a_helper_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    path = program(tmp_path, "h", f"sleep 600 & echo $$ $! >{pids}; wait")
    began = time.monotonic()
    with pytest.raises(ImageError, match="no answer in 0.5 s"):
        ask(path, [], {"PATH": os.environ["PATH"]}, b"", 0.5, Errand())
    assert time.monotonic() - began < 20
    for pid in pids.read_text().split():
        assert _is_gone(int(pid)), f"{pid} is still there"


def test_a_program_ends_with_its_errand(tmp_path: Path) -> None:
    pids, errand = tmp_path / "pids", Errand()
    path = program(tmp_path, "h", f"sleep 600 & echo $$ $! >{pids}.new; mv {pids}.new {pids}; wait")
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask, path, [], {"PATH": os.environ["PATH"]}, b"", 600, errand)
        eventually(pids.exists)
        errand.end()
        with pytest.raises(ImageError, match="credential program h: given up, killed"):
            asking.result(SOON_S)
    assert all(_is_gone(int(pid)) for pid in pids.read_text().split())
    pids.unlink()
    with pytest.raises(ImageError, match="not asked: it was given up"):
        ask(path, [], {}, b"", 600, errand)
    with pytest.raises(ImageError, match="not asked: what was asked before it has taken all of 0 s"):
        ask(path, [], {}, b"", 600, Errand(0))
    assert not pids.exists()


def test_programs_share_the_time_of_their_errand(tmp_path: Path) -> None:
    path = program(tmp_path, "h", "sleep 600")
    errand = Errand(0.4)
    for says in ("no answer in 0.[34]", "no answer in 0.[012]|has taken all of 0.4 s", "has taken all of 0.4 s"):
        with pytest.raises(ImageError, match=says):
            ask(path, [], {"PATH": os.environ["PATH"]}, b"", 0.3, errand)


def _is_gone(pid: int) -> bool:
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_a_helper_inherits_nothing(tmp_path: Path) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(fd, True)
    try:
        answer = ask(program(tmp_path, "h", "ls /proc/$$/fd"), [], {"PATH": os.environ["PATH"]}, b"", 30, Errand())
    finally:
        os.close(fd)
    # The shell has its script open as one more, with a high number.
    assert {int(name) for name in answer.split()} & set(range(3, 10)) == set()


def test_a_long_question_meets_a_deaf_program(tmp_path: Path) -> None:
    answer = ask(program(tmp_path, "h", "echo heard"), [], {"PATH": os.environ["PATH"]}, b"x" * (1 << 20), 30, Errand())
    assert answer == b"heard\n"


# ----------------------------------------------------------------------------------------------------------- providers

PROVIDERS = """
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: cloud
  matchImages: ["*.cloud.example", "flat.example/team"]
  defaultCacheDuration: "1m30s"
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  args: [--verbose]
  env:
  - name: REGION
    value: here
"""


def answer(kind: str = "Registry", key: str = "*.cloud.example", duration: str = '"10m"') -> str:
    return (
        '{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderResponse",'
        f'"cacheKeyType":"{kind}","cacheDuration":{duration},'
        f'"auth":{{"{key}":{{"username":"robot","password":"pass"}}}}}}'
    )


def provided(tmp_path: Path, said: str, text: str = PROVIDERS) -> Keyring:
    (tmp_path / "providers.yaml").write_text(text)
    program(tmp_path, "cloud", f"cat >>{tmp_path}/asked; echo \" $1 $REGION\" >>{tmp_path}/asked; echo '{said}'")
    environment = {"PATH": os.environ["PATH"]}
    return Keyring(KeyringConfig((), tmp_path / "providers.yaml", tmp_path / "bin", environment))


def test_provider(tmp_path: Path) -> None:
    keyring = provided(tmp_path, answer())
    assert keyring.find("a.cloud.example", "team/app") == Credentials("robot", "pass")
    assert keyring.find("other.example", "team/app") is None
    request, _, rest = (tmp_path / "asked").read_text().partition(" --verbose")
    assert json.loads(request) == {
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "kind": "CredentialProviderRequest",
        "image": "a.cloud.example/team/app",
    }
    assert rest == " here\n"


@pytest.mark.parametrize(
    ("kind", "duration", "asked"), [("Registry", '"10m"', 2), ("Image", '"10m"', 3), ("Global", '"1h"', 1)]
)
def test_how_long_an_answer_is_kept(tmp_path: Path, kind: str, duration: str, asked: int) -> None:
    keyring = provided(tmp_path, answer(kind, duration=duration))
    for name in ("a.cloud.example", "a.cloud.example", "b.cloud.example"):
        keyring.find(name, f"team/{'x' if name[0] == 'a' else 'y'}")
    keyring.find("a.cloud.example", "team/z")
    assert (tmp_path / "asked").read_text().count("CredentialProviderRequest") == asked


def test_an_answer_that_may_not_be_kept(tmp_path: Path) -> None:
    keyring = provided(tmp_path, answer("Global", duration='"0"'))
    for _ in range(2):
        assert keyring.find("a.cloud.example", "x") is not None
    assert (tmp_path / "asked").read_text().count("CredentialProviderRequest") == 2


def test_s27_an_answer_for_another_host_is_not_used(tmp_path: Path) -> None:
    assert provided(tmp_path, answer(key="evil.example")).find("a.cloud.example", "x") is None


@pytest.mark.parametrize("said", ["", "{}", answer("Often"), answer(duration='"soon"'), answer().replace("v1", "v9")])
def test_bad_answers_of_providers(tmp_path: Path, said: str) -> None:
    with pytest.raises(ImageError, match="its answer is no") as error:
        provided(tmp_path, said).find("a.cloud.example", "x")
    assert "robot" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("name: cloud", "name: ../cloud", "name"),
        ("/v1\n  args", "/v7\n  args", "apiVersion"),
        ('["*.cloud.example", "flat.example/team"]', "[]", "matchImages"),
        ('"1m30s"', "soon", "defaultCacheDuration"),
        ("providers:", "providers: [", "YAML"),
        ("[--verbose]", "2001-01-01", "YAML"),
    ],
)
def test_bad_provider_files(tmp_path: Path, old: str, new: str, says: str) -> None:
    (tmp_path / "providers.yaml").write_text(PROVIDERS.replace(old, new))
    with pytest.raises(ImageError, match=says):
        read_providers(tmp_path / "providers.yaml")
