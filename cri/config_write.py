"""The values of cri.config as a configuration file.

Refuses to decide anything. Invariant: what is written here is read by cri.config_read to the same values.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from cri.config import Config


def default_toml() -> str:
    """The defaults as a configuration file with every key documented, for `ocid config --default`."""
    return as_toml(Config())


def as_toml(config: Config) -> str:
    """`config` as a file that gives it again, every key documented."""
    lines = ["# Configuration of ocid. Files in conf.d/ beside this one win over it, key by key.", ""]
    sections = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            sections.append((item, value))
        else:
            lines += _documented(item, value)
    for item, section in sections:
        lines += ["", f"# {item.metadata['doc']}", f"[{item.name}]"]
        for key in dataclasses.fields(section):
            lines += _documented(key, getattr(section, key.name))
    return "\n".join(lines) + "\n"


def _documented(item: dataclasses.Field[Any], value: Any) -> list[str]:
    return [f"# {item.metadata['doc']}", f"{item.name} = {_toml(value)}"]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_quoted(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    return _quoted(os.fspath(value))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
