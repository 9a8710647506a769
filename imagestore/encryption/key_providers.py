"""Key providers: programs and services of a node that wrap and unwrap layers' keys, by ocicrypt's protocol.

    {"key-providers": {"NAME": {"cmd": {"path": "/usr/lib/…", "args": […]}},        OCICRYPT_KEYPROVIDER_CONFIG
                       "NAME": {"grpc": "unix:///run/…", "grpc-tls": {…}}}}         key_services.py

    stdin   {"op": "keyunwrap", "keyunwrapparams": {"dc": {"Parameters": …}, "annotation": base64}}
    stdout  {"keyunwrapresults": {"optsdata": base64}}                              and "keywrap" the other way

Blocking, for worker threads. Refuses paths that are not absolute. The file is read for every use, as key files are.
Invariant: a program is run, and a service asked, only because the node's file names it, never because an image does;
nothing that it says is in a message.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from imagestore.encryption.key_services import Service, call, service
from imagestore.errands import Errand
from imagestore.model import ContentInvalid, DecryptionRefused, ImageError, KeyFile
from imagestore.programs import ask
from imagestore.strict_json import Fields, parse_object
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.linux.libc import KernelError

PROVIDER = "provider:"
_FILE_BYTES = 1 << 20
_VALUES = 10_000
ANSWER_S = 20.0  # a container may be waiting

Parameters = Mapping[str, Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class _Command:
    path: Path
    arguments: tuple[str, ...]


def named(option: str) -> tuple[str, bytes]:
    """What "provider:NAME" or "provider:NAME:PARAMETER" says, in ocicrypt's words. Raises DecryptionRefused."""
    name, colon, parameter = option.removeprefix(PROVIDER).partition(":")
    if not name:
        raise DecryptionRefused(f"key {option!r}: expected provider:NAME or provider:NAME:PARAMETER")
    return name, parameter.encode("utf-8", "surrogateescape") if colon else b"Enabled"


def parameters(files: Iterable[KeyFile]) -> dict[str, list[bytes]]:
    """Those of `files` that name a provider, with what it is to be told."""
    found: dict[str, list[bytes]] = {}
    for file in files:
        if file.name.startswith(PROVIDER):
            found.setdefault(file.name.removeprefix(PROVIDER), []).append(file.data)
    return found


class KeyProviders:
    """Those of one file; None is none."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def unwrap(self, name: str, packet: bytes, given: Parameters, errand: Errand) -> bytes | None:
        """What `name` makes of a packet; None where the node has no such provider. Raises DecryptionRefused."""
        provider = self._listed().get(name)
        if provider is None:
            return None
        request = {
            "op": "keyunwrap",
            "keywrapparams": {"ec": None, "optsdata": None},
            "keyunwrapparams": {"dc": {"Parameters": _encoded(given)}, "annotation": _b64(packet)},
        }
        return self._ask(name, provider, request, ("keyunwrapresults", "optsdata"), errand)

    def wrap(self, name: str, given: Parameters, private: bytes, errand: Errand) -> bytes:
        """A packet that `name` unwraps. Raises DecryptionRefused."""
        provider = self._listed().get(name)
        if provider is None:
            where = f"is not in {self._file}" if self._file else "is not known: image.key_providers names no file"
            raise DecryptionRefused(f"key provider {name!r} {where}")
        to = {"Parameters": _encoded(given), "DecryptConfig": {"Parameters": {}}}
        request = {
            "op": "keywrap",
            "keywrapparams": {"ec": to, "optsdata": _b64(private)},
            "keyunwrapparams": {"dc": None, "annotation": None},
        }
        return self._ask(name, provider, request, ("keywrapresults", "annotation"), errand)

    def _ask(
        self,
        name: str,
        provider: _Command | Service,
        request: Mapping[str, object],
        wanted: tuple[str, str],
        errand: Errand,
    ) -> bytes:
        """The bytes that are `wanted`: which part of the answer, and which key in it."""
        part, key = wanted
        what = f"key provider {name!r}"
        data = json.dumps(request, separators=(",", ":")).encode()
        try:
            if isinstance(provider, Service):
                answer = call(provider, str(request["op"]), data, ANSWER_S, errand)
            else:
                answer = ask(provider.path, provider.arguments, os.environ, data, ANSWER_S, errand, called="program")
        except ImageError as error:
            raise DecryptionRefused(f"{what}: {error}") from None
        try:
            results = parse_object(answer, what, _VALUES).object(part)
            found = base64.b64decode(results.string(key), validate=True) if results else b""
        except (ContentInvalid, binascii.Error, ValueError):
            raise DecryptionRefused(f"{what}: its answer is none of ocicrypt's protocol") from None
        if not found:
            raise DecryptionRefused(f"{what}: its answer has no {key}")
        return found

    def _listed(self) -> dict[str, _Command | Service]:
        if self._file is None:
            return {}
        what = f"key providers {self._file}"
        try:
            data = read_bounded(AT_FDCWD, str(self._file), _FILE_BYTES)
        except KernelError as error:
            raise DecryptionRefused(f"key providers: {error}") from error
        try:
            listed = parse_object(data, what, _VALUES).object("key-providers")
            found = {}
            for name in listed.names() if listed else ():
                entry = listed.object(name) if listed else None
                if entry is not None:
                    found[name] = _provider(entry)
            return found
        except ContentInvalid as error:
            raise DecryptionRefused(str(error)) from None


def _provider(entry: Fields) -> _Command | Service:
    command = entry.object("cmd")
    if command is None:
        if not entry.string("grpc"):
            raise ContentInvalid(f"{entry.path}: neither cmd nor grpc")
        return service(entry.string("grpc"), entry.object("grpc-tls"), f"{entry.path}.grpc")
    path = command.string("path")
    if not path.startswith("/"):
        raise ContentInvalid(f"{command.path}.path: {path[:100]!r} is no absolute path")
    return _Command(Path(path), command.strings("args"))


def _encoded(given: Parameters) -> dict[str, list[str]]:
    return {name: [_b64(one) for one in values] for name, values in given.items()}


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
