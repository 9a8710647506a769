"""Overlays in config.json: one directory of them (X-mount.subdir), and layers whose ids are mapped (idmap)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import Bundle, Bundles, bundles
from tests.integration.test_runtime_mounts import host_mounts
from tests.support import needs


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox", "overlay")
    before, fds = host_mounts(), len(os.listdir("/proc/self/fd"))
    with bundles(tmp_path) as opened:
        top = opened.directory
        for layer, name in (("low", "one"), ("high", "two")):
            (top / layer / "inner").mkdir(parents=True)
            (top / layer / "inner" / name).write_text(f"{name}\n")
            os.chown(top / layer / "inner" / name, 7, 8)
        (top / "outside").mkdir()
        (top / "outside/secret").touch()
        (top / "high/out").symlink_to(top / "outside")
        (top / "high/up").symlink_to("../../../../../../../.." + str(top / "outside"))
        (top / "high/in").symlink_to("/inner")
        yield opened
    assert host_mounts() == before and len(os.listdir("/proc/self/fd")) == fds


def overlaid(home: Bundles, script: str, *options: str) -> Bundle:
    lowers = [f"lowerdir={home.directory}/high:{home.directory}/low"]
    return home.sh(script).mount("/vol", "overlay", "overlay", "ro", *options, *lowers)


def test_a_directory_takes_the_place_of_the_whole(home: Bundles) -> None:
    for name in ("inner", "in", "inner/."):
        one = overlaid(home, "ls /vol; grep -c ' /vol ' /proc/mounts; touch /vol/x", f"X-mount.subdir={name}")
        said = one.run()
        assert said.text.split() == ["one", "two", "1"] and "Read-only" in said.error


@pytest.mark.parametrize("name", ["out", "up", "../outside", "missing", "inner/one"])
def test_s57_it_lies_inside_whatever_the_links_say(home: Bundles, name: str) -> None:
    one = overlaid(home, "ls /vol", f"X-mount.subdir={name}")
    said = one.run().failed("X-mount.subdir: ")
    assert "secret" not in said
    one.gone()


def test_layers_show_the_ids_of_the_user_namespace(home: Bundles) -> None:
    one = overlaid(home, "stat -c %u:%g /vol/inner /vol/inner/one", "idmap").user_namespace(host=300_000)
    assert one.run().ok().split() == ["0:0", "7:8"]
    assert (home.directory / "low/inner/one").stat().st_uid == 7
    other = overlaid(home, "stat -c %u /vol/one", "idmap", "X-mount.subdir=inner").user_namespace(host=300_000)
    assert other.run().ok() == "7\n"


def test_only_an_overlay_has_layers_to_map(home: Bundles) -> None:
    one = home.make("true").mount("/vol", "tmpfs", "tmpfs", "idmap")
    one.run().failed("id-mapped mounts are only supported for bind-mounts")
