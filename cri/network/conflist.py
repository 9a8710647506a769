"""CNI network configuration: bytes from /etc/cni/net.d to frozen values, once, naming the bad field by its path.

Refuses what is not strict JSON (duplicate keys, NaN, more than a mebibyte), network and plugin names that are no plain
names (they become paths), and versions outside 0.3.1 to 1.1.0. Invariant: behind this file a list's own settings are
attributes; only a plugin's configuration stays JSON, since other programs define what is in it.
See the CNI specification 1.1, section 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from runtime.linux.dataclass import dataclass

SIZE_LIMIT: Final = 1 << 20
PLUGIN_LIMIT: Final = 32
VERSIONS: Final = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")

# CNI spec 1.1, "Network configuration": names start with an alphanumeric and go on with `_`, `.`, `-` as well.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")

Json = Mapping[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be used: one sentence with the field's path."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin of a list. `config` is its object as written, without what the runtime adds to it."""

    type: str
    config: Json
    capabilities: frozenset[str]


@dataclass(frozen=True, slots=True)
class Conflist:
    """A network: `versions` are those its author allows, ascending; `source` says where it is from, for errors."""

    name: str
    versions: tuple[str, ...]
    plugins: tuple[Plugin, ...]
    disable_check: bool
    disable_gc: bool
    source: str

    @property
    def version(self) -> str:
        """The newest version allowed that ocid speaks."""
        return self.versions[-1]

    def document(self) -> dict[str, Any]:
        """As JSON again, for the record of a pod; `parse_list` of it gives an equal value."""
        return {
            "cniVersion": self.version,
            "cniVersions": list(self.versions),
            "name": self.name,
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "plugins": [dict(plugin.config) for plugin in self.plugins],
        }


def is_name(text: object) -> bool:
    """A name that may become a file name: of a network, a plugin, a container."""
    return isinstance(text, str) and _NAME.match(text) is not None and ".." not in text


# --------------------------------------------------------------------------------------------------- strict JSON


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"key {key!r} occurs twice")
        found[key] = value
    return found


def _constant(word: str) -> NoReturn:
    raise ConfigError(f"{word} is not JSON")


def parse_json(data: bytes, what: str) -> Any:
    """Strict JSON: another reader of the same bytes cannot see something else (threats P7). Raises ConfigError."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
    except RecursionError:
        raise ConfigError(f"{what}: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: not UTF-8 at byte {error.start}") from None
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    except ValueError as error:  # JSONDecodeError, and int() of more than 4300 digits
        raise ConfigError(f"{what}: not JSON: {error}") from None


_JSON_NAMES = {str: "a string", bool: "a boolean", dict: "an object", list: "a list", int: "an integer"}


def field(document: Json, key: str, kind: type, default: Any, path: str = "") -> Any:
    """`document[key]` of JSON type `kind`; missing or null is `default`. Raises ConfigError naming `path.key`."""
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}{key}: expected {_JSON_NAMES[kind]}, got {json.dumps(value)[:60]}")
    return value


# ---------------------------------------------------------------------------------------------------------- lists


def _versions(document: Json) -> tuple[str, ...]:
    single = field(document, "cniVersion", str, "")
    offered = field(document, "cniVersions", list, [])
    if not all(isinstance(item, str) for item in offered):
        raise ConfigError("cniVersions: expected a list of strings")
    offered = [*offered, *([single] if single else [])]
    known = tuple(version for version in VERSIONS if version in offered)
    if not known:
        said = ", ".join(sorted(set(offered))) or "nothing, which means 0.1.0"
        raise ConfigError(f"cniVersion: {said}; ocid speaks {VERSIONS[0]} to {VERSIONS[-1]}")
    return known


def _plugin(document: object, path: str) -> Plugin:
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected an object")
    kind = field(document, "type", str, "", f"{path}.")
    if not is_name(kind):
        raise ConfigError(f"{path}.type: {kind[:60]!r} is not a plugin's name")
    offered = field(document, "capabilities", dict, {}, f"{path}.")
    ipam = field(document, "ipam", dict, {}, f"{path}.").get("type")
    if ipam and not is_name(ipam):
        raise ConfigError(f"{path}.ipam.type: {str(ipam)[:60]!r} is not a plugin's name")
    return Plugin(kind, document, frozenset(name for name, wanted in offered.items() if wanted is True))


def parse_list(document: object, source: str) -> Conflist:
    """A conflist, or a single plugin's configuration as older files hold it. Raises ConfigError."""
    if not isinstance(document, dict):
        raise ConfigError(f"{source}: expected an object")
    try:
        name = field(document, "name", str, "")
        if not is_name(name):
            raise ConfigError(f"name: {name[:60]!r} is not a network's name")
        plugins = field(document, "plugins", list, None)
        if plugins is None:
            plugins = [{key: value for key, value in document.items() if key not in ("cniVersion", "name")}]
        if not 0 < len(plugins) <= PLUGIN_LIMIT:
            raise ConfigError(f"plugins: {len(plugins)} of them, expected 1 to {PLUGIN_LIMIT}")
        return Conflist(
            name,
            _versions(document),
            tuple(_plugin(item, f"plugins[{number}]") for number, item in enumerate(plugins)),
            field(document, "disableCheck", bool, False),
            field(document, "disableGC", bool, False),
            source,
        )
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def parse_file(data: bytes, source: str) -> Conflist:
    """The content of a .conflist, .conf or .json file. Raises ConfigError."""
    return parse_list(parse_json(data, source), source)
