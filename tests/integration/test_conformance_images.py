"""Our test images as others read them: built twice the same, served by a real registry, read by skopeo."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from conformance.images import NAMES, layouts, push
from conformance.images.layout import Layout
from conformance.images.recipes import CACHE, RECIPES, Packages
from conformance.registry import registry
from tests.support import needs


def _skopeo(*arguments: str) -> str:
    return subprocess.run(["skopeo", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["busybox", "layers"])
def test_images_are_reproducible(tmp_path: Path, name: str) -> None:
    needs("root")
    (first,) = layouts([name])
    again = Layout(tmp_path / "again")
    RECIPES[name](Packages(CACHE), again)
    assert json.loads((again.finish() / "index.json").read_text()) == json.loads((first / "index.json").read_text())


def test_a_registry_serves_what_was_pushed(tmp_path: Path) -> None:
    needs("root", "docker-registry", "skopeo")
    with registry(tmp_path / "registry", measured=False) as here:
        pushed = [reference for layout in layouts() for reference in push(layout, here.address)]
        assert sorted(pushed) == sorted(here.reference(name) for name in NAMES)
        for reference in pushed:
            # Copying reads every blob and checks every digest.
            target = tmp_path / reference.rpartition("/")[2].replace(":", "-")
            _skopeo("copy", "--src-tls-verify=false", f"docker://{reference}", f"dir:{target}")
            assert (target / "manifest.json").is_file()
        seen = json.loads(_skopeo("inspect", "--tls-verify=false", f"docker://{here.reference('nginx:1')}"))
        assert len(seen["Layers"]) == 3 and seen["Architecture"] == "amd64"
