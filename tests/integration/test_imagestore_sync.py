"""`ocid sync`: which images, under which names, what a failure leaves; conformance/run images has it beside skopeo."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri.cli.main import ocid
from tests.fakes.registry import FakeRegistry, Reply, build_image, build_index, sha256

ONE, TWO = build_image([{"a": b"1"}]), build_image([{"b": b"2"}], architecture="arm64")


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        for tag in ("1", "2"):
            made.add("team/app", tag, ONE)
        made.add("team/deep/tools", "x", ONE)
        made.add("team/many", "arm", TWO)
        made.add("team/many", "amd", ONE)
        made.put("team/many", "all", build_index([ONE, TWO]), "application/vnd.oci.image.index.v1+json")
        yield made


def sync(directory: Path, *words: str, code: int = 0) -> tuple[list[str], str]:
    config = directory / "config.toml"
    config.write_text('[image]\nhosts_dirs = []\nregistries_conf = "/none"\nauth_files = ["/dev/null"]\n')
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = ocid(["--config", str(config), "sync", "--insecure-policy", *words])
    assert status == code, err.getvalue()
    assert not list(directory.rglob(".ocid-copy-*"))
    return out.getvalue().splitlines(), err.getvalue()


def images(directory: Path) -> set[str]:
    return {str(path.parent.relative_to(directory)) for path in directory.rglob("manifest.json")}


def test_every_tag_of_a_repository(registry: FakeRegistry, tmp_path: Path) -> None:
    out, _ = sync(tmp_path, "-s", "docker", "-d", "dir", f"{registry.name}/team/app", f"{tmp_path}/to")
    assert images(tmp_path / "to") == {"app:1", "app:2"}
    assert out == [f"{ONE.digest}  dir:{tmp_path}/to/app:{tag}" for tag in "12"]
    sync(tmp_path, "-s", "docker", "-d", "dir", "--scoped", f"{registry.name}/team/deep/tools:x", f"{tmp_path}/whole")
    assert images(tmp_path / "whole") == {f"{registry.name}/team/deep/tools:x"}


def test_back_from_a_directory(registry: FakeRegistry, tmp_path: Path) -> None:
    sync(tmp_path, "-s", "docker", "-d", "dir", f"{registry.name}/team/app", f"{tmp_path}/to")
    sync(tmp_path, "-s", "dir", "-d", "docker", f"{tmp_path}/to", f"{registry.name}/back")
    assert {tag for path, tag in registry.manifests if path == "back/app"} >= {"1", "2"}
    sync(tmp_path, "-s", "dir", "-d", "docker", f"{tmp_path}/to/app:2", f"docker://{registry.name}/one/")
    assert ("one/app", "2") in registry.manifests and ("one/app", "1") not in registry.manifests


def test_a_list(registry: FakeRegistry, tmp_path: Path) -> None:
    wanted = tmp_path / "list.yaml"
    wanted.write_text(
        f"{registry.name}:\n  images:\n    team/app: []\n    team/many: [amd, '{TWO.digest}']\n"
        "  images-by-tag-regex: {team/deep/tools: '^x$'}\n  tls-verify: false\n"
        "  credentials: {username: me, password: secret}\n"
    )
    registry.basic = ("me", "secret")
    sync(tmp_path, "-s", "yaml", "-d", "dir", str(wanted), f"{tmp_path}/to")
    assert images(tmp_path / "to") == {"app:1", "app:2", "many:amd", f"many@{TWO.digest}", "tools:x"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "expected registries by their names"),
        ("{", "expected YAML"),
        ("{}", "asks for no images"),
        ("r.io: {images: {}}", "asks for no images"),
        ("r.io: {imags: {a: []}}", "r.io: unknown key 'imags'; known here: images"),
        ("r.io: {cert-dir: /x}", "unknown key 'cert-dir'"),
        ("r.io: {images: {a: 1}}", "r.io.images.a: expected an array of strings, got an integer"),
        ("r.io: {images: {a: [1.0]}}", "r.io.images.a: expected an array of strings"),
        ("r.io: {images-by-tag-regex: {a: '('}}", "images-by-tag-regex.a: "),
        ("r.io: {tls-verify: 'no'}", "r.io.tls-verify: expected a boolean, got a string"),
        ("r.io: {credentials: {user: x}}", "unknown key 'user'"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "list.yaml").write_text(text)
    _, said = sync(tmp_path, "-s", "yaml", "-d", "dir", f"{tmp_path}/list.yaml", f"{tmp_path}/to", code=125)
    assert says in said


def test_what_is_there_is_not_written_over(registry: FakeRegistry, tmp_path: Path) -> None:
    words = ("-s", "docker", "-d", "dir", f"{registry.name}/team/app", f"{tmp_path}/to")
    sync(tmp_path, *words)
    _, said = sync(tmp_path, *words, code=125)
    assert "app:1: there is an image already" in said
    (tmp_path / "to/app:2/manifest.json").unlink()  # as a copy leaves it that was killed
    _, said = sync(tmp_path, *words, "--keep-going", code=125)
    assert "app:1: there is an image already" in said and "1 image was not copied" in said
    assert images(tmp_path / "to") == {"app:1", "app:2"}


def test_one_that_fails(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.rule("GET", "/team/many/manifests/amd", Reply(404))
    words = ("-s", "docker", "-d", "dir", f"{registry.name}/team/many")
    _, said = sync(tmp_path, *words, "--keep-going", "--all", f"{tmp_path}/rest", code=125)
    assert images(tmp_path / "rest") == {"many:all", "many:arm"} and "1 image was not copied" in said
    sync(tmp_path, *words, f"{tmp_path}/none", code=125)
    assert "many:amd" not in images(tmp_path / "none")


def test_a_dry_run(registry: FakeRegistry, tmp_path: Path) -> None:
    out, _ = sync(tmp_path, "-s", "docker", "-d", "dir", "--dry-run", f"{registry.name}/team/app", f"{tmp_path}/to")
    assert out[0] == f"docker://{registry.name}/team/app:1 -> dir:{tmp_path}/to/app:1"
    assert not (tmp_path / "to").exists() and not registry.count("GET", "/manifests/")
    _, said = sync(tmp_path, "-s", "dir", "-d", "dir", "a", "b", code=125)
    assert "copy the files" in said
    _, said = sync(tmp_path, "-s", "dir", "-d", "docker", str(tmp_path), registry.name, code=125)
    assert "there is no image in it" in said


def test_an_index_with_all_of_it(registry: FakeRegistry, tmp_path: Path) -> None:
    index = sha256(build_index([ONE, TWO]))
    words = ("-s", "docker", "-d", "dir", f"{registry.name}/team/many:all")
    assert sync(tmp_path, *words, "--all", f"{tmp_path}/to")[0] == [f"{index}  dir:{tmp_path}/to/many:all"]
    out, _ = sync(tmp_path, *words, "--platform", "linux/arm64", f"{tmp_path}/arm")
    assert out == [f"{TWO.digest}  dir:{tmp_path}/arm/many:all"]
