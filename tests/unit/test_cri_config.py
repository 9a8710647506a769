"""The configuration: what is refused, by which words, and that the printed defaults are the defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cri.config import Config, ConfigError
from cri.config_read import load
from cri.config_write import default_toml


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_printed_defaults_parse_to_the_defaults(tmp_path: Path) -> None:
    assert load(_file(tmp_path, default_toml())) == Config()


def test_every_key_is_documented() -> None:
    def walk(kind: object) -> None:
        for item in dataclasses.fields(kind):  # type: ignore[arg-type]
            assert len(item.metadata["doc"]) > 10, item.name
            value = getattr(kind, item.name)
            if dataclasses.is_dataclass(value):
                walk(value)

    walk(Config())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rooot = '/x'", "rooot: unknown key"),
        ("[runtime]\nhandler = 'x'", "runtime.handler: unknown key"),
        ("root = 3", "root: expected a path, got 3"),
        ("root = 'var'", "root: expected an absolute path"),
        ("listen = 'tcp://0.0.0.0:1'", "listen: expected unix:///PATH"),
        ("log_level = 'loud'", "log_level: expected one of debug, info"),
        ("runtime = 4", "runtime: expected a table"),
        ("[runtime.handlers]\nkata = 'kata'", 'runtime.handlers: expected "native" or the absolute path'),
        ("[runtime.handlers]\nkata = 4", "runtime.handlers: expected a table of strings"),
        ("[runtime]\ncgroup_driver = 'other'", "runtime.cgroup_driver: expected one of cgroupfs"),
        ("[runtime]\ncgroup_parent = '/a/../b'", "runtime.cgroup_parent: expected an absolute path"),
        ("[runtime]\ndefault_handler = 'runc'", "runtime.default_handler: 'runc' is not one of"),
        ("[limits]\nexec_output_bytes = 1", "limits.exec_output_bytes: expected at least 1024"),
        ("[limits]\nexec_output_bytes = true", "limits.exec_output_bytes: expected an integer"),
        ("[network]\nbin_dirs = 'x'", "network.bin_dirs: expected a list of paths"),
        ("root = ", "not TOML"),
    ],
)
def test_wrong_configuration_is_refused_by_path(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(_file(tmp_path, text))
    assert words in str(caught.value)


def test_conf_d_wins_key_by_key_in_order(tmp_path: Path) -> None:
    path = _file(tmp_path, "root = '/a'\n[runtime]\nshm_bytes = 8192\ncgroup_parent = '/x'")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "20.toml").write_text("[runtime]\nshm_bytes = 20480")
    (tmp_path / "conf.d" / "10.toml").write_text("[runtime]\nshm_bytes = 10240")
    config = load(path)
    assert (str(config.root), config.runtime.shm_bytes, config.runtime.cgroup_parent) == ("/a", 20480, "/x")


def test_error_names_the_file_in_conf_d(tmp_path: Path) -> None:
    path = _file(tmp_path, "")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "bad.toml").write_text("[limits]\nnope = 1")
    with pytest.raises(ConfigError, match=r"conf\.d/bad\.toml: limits\.nope: unknown key"):
        load(path)


def test_command_line_wins_and_the_socket_follows_the_state(tmp_path: Path) -> None:
    config = load(_file(tmp_path, "root = '/a'"), root="/b", state="/run/other", listen=None)
    assert (str(config.root), str(config.socket)) == ("/b", "/run/other/ocid.sock")


def test_missing_file_is_an_error_only_when_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.toml")


def test_the_native_handler_is_always_there(tmp_path: Path) -> None:
    config = load(_file(tmp_path, "[runtime]\ndefault_handler = 'runc'\n[runtime.handlers]\nrunc = '/usr/sbin/runc'"))
    assert dict(config.runtime.handlers) == {"native": "native", "runc": "/usr/sbin/runc"}


def test_the_systemd_driver_wants_slices(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[runtime]\ncgroup_driver = "systemd"\n')
    assert load(file).runtime.cgroup_parent == "/ocid.slice"
    file.write_text('[runtime]\ncgroup_driver = "systemd"\ncgroup_parent = "/x/a-b.slice"\n')
    assert load(file).runtime.cgroup_parent == "/a.slice/a-b.slice"
    for wrong in ("/plain", "/a--b.slice"):
        file.write_text(f'[runtime]\ncgroup_driver = "systemd"\ncgroup_parent = "{wrong}"\n')
        with pytest.raises(ConfigError, match=r"runtime.cgroup_parent: .* is no slice"):
            load(file)
