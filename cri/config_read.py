"""Configuration files to the values of cri.config.

Reads FILE, then FILE's directory's conf.d/*.toml in the order of their names, the later winning key by key. Refuses
an unknown key, a wrong type and a number out of range, each by its path ("runtime.handlers.kata: expected …").
Invariant: an error names the file that it is in.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from cri.config import NATIVE, Config, ConfigError, RuntimeSection

DEFAULT_FILE = Path("/etc/ocid/config.toml")

# Of the same classes for each file, and for all of them together.
_types: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


def load(path: Path | None = None, **overrides: Any) -> Config:
    """The configuration in `path` (which must exist) or the default file (which need not), conf.d on top, and
    `overrides` of top-level keys, None meaning not given. Raises ConfigError."""
    main = path or DEFAULT_FILE
    merged: dict[str, Any] = {}
    files = [main] if path is not None or main.exists() else []
    files += sorted((main.parent / "conf.d").glob("*.toml"))
    for file in files:
        _merge(merged, _read(file))
    merged.update({key: os.fspath(value) for key, value in overrides.items() if value is not None})
    if overrides.get("state") is not None and overrides.get("listen") is None and "listen" not in merged:
        merged["listen"] = f"unix://{merged['state']}/ocid.sock"
    config: Config = _build(Config, merged, "")
    # Naming another handler does not take the one inside away.
    handlers = {NATIVE: NATIVE, **config.runtime.handlers}
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, handlers=handlers))
    if config.runtime.cgroup_driver == "systemd":
        config = dataclasses.replace(config, runtime=_with_slice(config.runtime))
    if config.runtime.default_handler not in config.runtime.handlers:
        raise ConfigError(
            f"runtime.default_handler: {config.runtime.default_handler!r} is not one of runtime.handlers: "
            f"{', '.join(sorted(config.runtime.handlers))}"
        )
    return config


def _with_slice(section: RuntimeSection) -> RuntimeSection:
    from runtime.cgroups.scope import expand_slice
    from runtime.errors import RuntimeFailure

    parent = section.cgroup_parent
    if parent == RuntimeSection().cgroup_parent:
        parent += ".slice"
    try:
        path = expand_slice(parent.rpartition("/")[2])
    except RuntimeFailure as error:
        raise ConfigError(
            f"runtime.cgroup_parent: {parent!r} is no slice, and cgroup_driver is systemd: {error}"
        ) from None
    return dataclasses.replace(section, cgroup_parent=path)


def _read(file: Path) -> dict[str, Any]:
    import tomllib  # most nodes have no such file

    try:
        with file.open("rb") as stream:
            table = tomllib.load(stream)
        _build(Config, table, "")  # so that the error names the file it is in
        return table
    except OSError as error:
        raise ConfigError(f"read configuration {file}: {(error.strerror or str(error)).lower()}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"read configuration {file}: not TOML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"read configuration {file}: {error}") from error


def _merge(into: dict[str, Any], table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def learn_types() -> None:
    """What `load` asks of the classes, ahead of it: it costs more than the rest of it."""
    for kind in _types(Config).values():
        if dataclasses.is_dataclass(kind):
            _types(kind)


def _build(kind: type[Any], table: Mapping[str, Any], path: str) -> Any:
    fields = {item.name: item for item in dataclasses.fields(kind)}
    types = _types(kind)
    values: dict[str, Any] = {}
    for key, raw in table.items():
        where = f"{path}{key}"
        if key not in fields:
            raise ConfigError(f"{where}: unknown key; known here: {', '.join(fields)}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(raw, dict):
                raise ConfigError(f"{where}: expected a table, got {raw!r}")
            values[key] = _build(types[key], raw, f"{where}.")
            continue
        values[key] = _value(types[key], raw, where)
        metadata = fields[key].metadata
        if metadata["least"] is not None and values[key] < metadata["least"]:
            raise ConfigError(f"{where}: expected at least {metadata['least']}, got {raw!r}")
        expected = metadata["check"](values[key]) if metadata["check"] else ""
        if expected:
            raise ConfigError(f"{where}: expected {expected}, got {raw!r}")
    return kind(**values)


def _value(kind: Any, raw: Any, where: str) -> Any:
    if kind is str and isinstance(raw, str):
        return raw
    if kind is Path and isinstance(raw, str):
        return Path(raw)
    if kind is bool and isinstance(raw, bool):
        return raw
    if kind is int and isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    if kind == tuple[Path, ...] and isinstance(raw, list) and all(isinstance(item, str) for item in raw):
        return tuple(Path(item) for item in raw)
    if kind == tuple[str, ...] and isinstance(raw, list) and all(isinstance(item, str) for item in raw):
        return tuple(raw)
    if kind == Mapping[str, str] and isinstance(raw, dict) and all(isinstance(item, str) for item in raw.values()):
        return dict(raw)
    raise ConfigError(f"{where}: expected {_words(kind)}, got {raw!r}")


def _words(kind: Any) -> str:
    names = {bool: "true or false", str: "a string", Path: "a path", int: "an integer", float: "a number"}
    lists = {tuple[Path, ...]: "a list of paths", tuple[str, ...]: "a list of strings"}
    return names.get(kind) or lists.get(kind) or "a table of strings"
