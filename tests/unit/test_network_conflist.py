"""Network configuration: what is accepted, and what each mistake is called."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cri.network import plan as planning
from cri.network.conflist import ConfigError, is_name, parse_file, parse_list
from cri.network.external import Binaries
from cri.network.firewall import Firewall
from cri.network.lists import Lists
from cri.network.plan import Tools


def _tools(tmp_path: Path) -> Tools:
    return Tools(
        Binaries((tmp_path / "bin",)),
        tmp_path / "leases",
        Firewall("unused", tmp_path.joinpath),
        lambda index, name: None,
    )


def _list(**changes: object) -> dict[str, object]:
    return {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]} | changes


def test_a_list_and_a_single_plugin() -> None:
    found = parse_list(_list(disableGC=True), "x")
    assert (found.name, found.version, found.disable_gc, found.plugins[0].type) == ("net", "1.0.0", True, "bridge")
    single = parse_list({"cniVersion": "0.4.0", "name": "one", "type": "ptp", "mtu": 1400}, "x")
    assert single.plugins[0].config == {"type": "ptp", "mtu": 1400} and single.version == "0.4.0"


def test_a_list_survives_its_record() -> None:
    before = parse_list(_list(cniVersions=["0.4.0", "1.1.0"], plugins=[{"type": "a", "x": [1, {"y": None}]}]), "x")
    assert parse_list(json.loads(json.dumps(before.document())), "x") == before
    assert before.versions == ("0.4.0", "1.0.0", "1.1.0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "expected an object"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b'{"name":"a","name":"b"}', "key 'name' occurs twice"),
        (b'{"name":NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"name":' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_p07_what_is_no_strict_json_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match="a.conflist: ") as caught:
        parse_file(text, "a.conflist")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../x"}, "name: '../x' is not a network's name"),
        ({"name": 7}, "name: expected a string, got 7"),
        ({"name": "a\n"}, "is not a network's name"),
        ({"cniVersion": "0.2.0"}, "cniVersion: 0.2.0; ocid speaks 0.3.1 to 1.1.0"),
        ({"cniVersion": ""}, "which means 0.1.0"),
        ({"cniVersions": "1.0.0"}, "cniVersions: expected a list"),
        ({"cniVersions": [1]}, "cniVersions: expected a list of strings"),
        ({"plugins": []}, "plugins: 0 of them"),
        ({"plugins": [{"type": "a"}] * 33}, "plugins: 33 of them"),
        ({"plugins": ["x"]}, "plugins[0]: expected an object"),
        ({"plugins": [{"type": "a"}, {"type": "/bin/sh"}]}, "plugins[1].type: '/bin/sh' is not"),
        ({"plugins": [{"type": ".."}]}, "plugins[0].type"),
        ({"plugins": [{"type": "a", "capabilities": []}]}, "plugins[0].capabilities: expected an object"),
        ({"plugins": [{"type": "a", "ipam": {"type": "../x"}}]}, "plugins[0].ipam.type: '../x'"),
        ({"disableCheck": "yes"}, "disableCheck: expected a boolean"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_list(_list(**changes), "a.conflist")
    assert words in str(caught.value) and str(caught.value).startswith("a.conflist: ")


@pytest.mark.parametrize("good", ["a", "A9", "web-1.0_x", "a" * 128])
def test_names(good: str) -> None:
    assert is_name(good)


@pytest.mark.parametrize(
    "bad", ["", ".", "-a", "_a", "a/b", "a b", "a..b", "a\0", "a\n", "ä", "１", "a" * 129, None, 3]
)
def test_s19_what_is_no_name(bad: object) -> None:
    assert not is_name(bad)


# ---------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("plugin", "native"),
    [
        ({"type": "bridge"}, True),
        ({"type": "bridge", "vlan": 0, "macspoofchk": False}, True),
        ({"type": "bridge", "ipMasqBackend": "nftables"}, True),
        ({"type": "bridge", "ipMasqBackend": "iptables"}, False),
        ({"type": "bridge", "vlan": 5}, False),
        ({"type": "bridge", "macspoofchk": True}, False),
        ({"type": "bridge", "ipam": {"routes": [{"dst": "0.0.0.0/0", "mtu": 1400}]}}, False),
        ({"type": "portmap"}, True),
        ({"type": "portmap", "conditionsV4": ["!", "-d", "10.0.0.0/8"]}, False),
        ({"type": "loopback"}, True),
        ({"type": "tuning"}, False),
    ],
)
def test_which_plugins_are_done_in_process(tmp_path: Path, plugin: dict[str, object], native: bool) -> None:
    found = planning.make(parse_list(_list(plugins=[plugin]), "x"), _tools(tmp_path))
    assert ("native" in found.steps[0].describe) is native and len(found.programs) == (not native)


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        ({"bridge": "a/b"}, "bridge: 'a/b' is not an interface's name"),
        ({"bridge": "x" * 16}, "is not an interface's name"),
        ({"bridge": ["cni0"]}, "bridge: expected a string"),
        ({"mtu": "1500"}, "mtu: expected an integer"),
        ({"mtu": 7}, "mtu: 7 is not between"),
        ({"isGateway": "yes"}, "isGateway: expected a boolean"),
        ({"hairpinMode": True, "promiscMode": True}, "exclude each other"),
        ({"ipam": {"type": "host-local"}}, "ipam.ranges: 0 of them"),
        ({"ipam": {"type": "host-local", "subnet": "10.1.0.0/33"}}, "ipam.ranges[0][0]"),
    ],
)
def test_a_wrong_setting_of_a_native_plugin_is_named_before_any_pod(
    tmp_path: Path, plugin: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        planning.make(parse_list(_list(plugins=[{"type": "bridge"} | plugin]), "x"), _tools(tmp_path))
    assert words in str(caught.value) and "x: plugins[0] (bridge): " in str(caught.value)


# ------------------------------------------------------------------------------------------------------ directories


def _lists(tmp_path: Path) -> Lists:
    tools = _tools(tmp_path)
    return Lists(tmp_path, lambda conflist: planning.make(conflist, tools))


def _write(path: Path, name: str, kind: str = "tuning") -> Path:
    path.write_text(json.dumps(_list(name=name, plugins=[{"type": kind}])))
    return path


def test_files_in_lexical_order_and_by_suffix(tmp_path: Path) -> None:
    for name in ("20-b.conflist", "10-a.json", "30-c.conf", "05-x.txt", ".hidden.conf"):
        _write(tmp_path / name, name.split("-")[-1][0])
    (tmp_path / "01-bad.conf").write_text("{")
    loaded = _lists(tmp_path).load()
    assert [found.name for found in loaded.networks] == ["a", "b", "c"]
    assert len(loaded.problems) == 1 and "01-bad.conf" in loaded.problems[0]


def test_a_missing_directory_holds_nothing(tmp_path: Path) -> None:
    assert Lists(tmp_path / "nosuch", lambda conflist: None).load().networks == ()


def test_a_change_in_place_is_noticed(tmp_path: Path) -> None:
    path, lists = _write(tmp_path / "a.conf", "one"), _lists(tmp_path)
    assert lists.load().networks[0].name == "one" and lists.load() is lists.load()
    _write(path, "another")
    assert lists.load().networks[0].name == "another"
    path.unlink()
    assert lists.load().networks == ()


def test_r05_files_that_are_no_files_or_too_large_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.conf")
    (tmp_path / "b.conf").symlink_to("/dev/zero")
    with open(tmp_path / "c.conf", "wb") as huge:
        huge.truncate(5 << 30)
    (tmp_path / "d.conf").symlink_to("nosuch")
    (tmp_path / "e.conf").mkdir()
    problems = _lists(tmp_path).load().problems
    assert len(problems) == 5 and all(f"{name}.conf" in text for name, text in zip("abcde", problems, strict=True))


def test_the_second_of_two_networks_with_one_name_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "a.conf", "net")
    _write(tmp_path / "b.conf", "net")
    loaded = _lists(tmp_path).load()
    assert len(loaded.networks) == 1 and "b.conf: name: net is the network of" in loaded.problems[0]
