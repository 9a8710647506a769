"""Key providers that are services: the same words as for programs (key_providers.py), as bytes in a gRPC message.

    /keyprovider.KeyProviderService/WrapKey, /UnWrapKey       message { bytes = 1 } each way

Blocking, for worker threads. What a layer's key is goes over the wire: refuses whoever is neither on this machine nor
behind TLS, and TLS that verifies nobody. Invariant: a call ends within its time, and its channel with it.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

from imagestore.errands import Errand
from imagestore.model import DecryptionRefused, ImageError
from imagestore.strict_json import Fields
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.linux.libc import KernelError

_SERVICE = "/keyprovider.KeyProviderService/"
_FIELD = b"\x0a"  # number 1, of a length
_ANSWER = 256 << 10
_FILE = 1 << 20
_METHODS = {"keywrap": "WrapKey", "keyunwrap": "UnWrapKey"}


@dataclass(frozen=True, slots=True)
class Service:
    """Where it is asked; without `tls` it is on this machine."""

    address: str
    tls: Fields | None


def service(address: str, tls: Fields | None, what: str) -> Service:
    """Raises DecryptionRefused."""
    if tls is None and not _is_here(address):
        raise DecryptionRefused(f"{what}: {address[:100]!r} is not on this machine, and has no grpc-tls")
    return Service(address, tls)


def _is_here(address: str) -> bool:
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition("/")[2].rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def call(where: Service, operation: str, data: bytes, limit_s: float, errand: Errand) -> bytes:
    """What the service answers within `limit_s` and what `errand` has left. Raises ImageError."""
    import grpc  # only on nodes that have such a provider

    try:
        limit_s = errand.share(limit_s)
    except ImageError as error:
        raise ImageError(f"service {where.address}: not asked: {error}") from None
    try:
        with _channel(where) as channel:
            ask = channel.unary_unary(
                _SERVICE + _METHODS[operation], request_serializer=_pack, response_deserializer=_unpack
            )
            asked = ask.future(data, timeout=limit_s)
            with errand.ended_by(asked.cancel):
                answer: bytes = asked.result()
            return answer
    except grpc.FutureCancelledError:
        raise DecryptionRefused(f"service {where.address}: given up") from None
    except grpc.RpcError as error:
        raise DecryptionRefused(f"service {where.address}: {error.code().name}") from None
    except KernelError as error:
        raise DecryptionRefused(f"service {where.address}: {error}") from None


def _channel(where: Service):  # type: ignore[no-untyped-def]  # grpc has no types
    import grpc

    options: list[tuple[str, object]] = [("grpc.max_receive_message_length", _ANSWER), ("grpc.enable_http_proxy", 0)]
    if where.tls is None:
        return grpc.insecure_channel(where.address, options)
    if where.tls.has("insecure-skip-verify"):
        raise DecryptionRefused(f"service {where.address}: insecure-skip-verify: who answers would not be known")
    root, key, certificate = (_file(where.tls.string(name)) for name in ("root-ca-file", "key-file", "cert-file"))
    if name := where.tls.string("server-name"):
        options.append(("grpc.ssl_target_name_override", name))
    return grpc.secure_channel(where.address, grpc.ssl_channel_credentials(root, key, certificate), options)


def _file(path: str) -> bytes | None:
    return read_bounded(AT_FDCWD, str(Path(path)), _FILE) if path else None


def _pack(data: bytes) -> bytes:
    size, length = len(data), bytearray()
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return _FIELD + bytes(length) + data


def _unpack(message: bytes) -> bytes:
    """b"" for what is no such message: whoever reads it says so."""
    if not message.startswith(_FIELD):
        return b""
    size = shift = 0
    for at in range(1, min(len(message), 6)):
        size |= (message[at] & 0x7F) << shift
        shift += 7
        if message[at] < 0x80:
            return message[at + 1 :] if at + 1 + size == len(message) else b""
    return b""
