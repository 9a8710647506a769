"""What a command prints, through an Exec URL to a client: over WebSocket with v4.channel.k8s.io, which both speak."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from conformance.bench.subject import Subject
from conformance.cri_client import container

PROTOCOL = "v4.channel.k8s.io"
STDOUT, STATUS = 1, 3  # channels, the first byte of each message
_BUFFER = 1 << 20
_PATIENCE_S = 60.0


def measure(subjects: Sequence[Subject], megabytes: int) -> None:
    total = megabytes * 1_000_000
    for subject in subjects:
        pod_config = subject.names.pod("stream")
        pod = subject.client.run_pod(pod_config)
        one = subject.client.create(pod, container("main", subject.image, ["sleep", "3600"]), pod_config)
        subject.client.start(one)
        url = subject.client.exec_url(one, ["head", "-c", str(total), "/dev/zero"])
        began = time.perf_counter()
        received, status = _received(url)
        seconds = time.perf_counter() - began
        if received != total or json.loads(status or b"{}").get("status") != "Success":
            raise RuntimeError(f"{subject.name}: {received} of {total} bytes came, then {status!r}")
        subject.values["stream"] = total / 1e6 / seconds
        subject.client.stop_pod(pod)
        subject.client.remove_pod(pod)


def _received(url: str) -> tuple[int, bytes]:
    """Bytes of stdout, and the status at the end."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), _PATIENCE_S) as connection:
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {parts.path}?{parts.query} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
            f"Sec-WebSocket-Protocol: {PROTOCOL}",
        )
        connection.sendall("\r\n".join((*lines, "", "")).encode())
        stream = connection.makefile("rb", buffering=_BUFFER)
        answer = stream.readline()
        if b" 101 " not in answer:
            raise RuntimeError(f"{url}: {answer!r}")
        while stream.readline().strip():
            pass
        count, status, inside = 0, b"", memoryview(bytearray(_BUFFER))
        while head := stream.read(2):
            kind, length = head[0] & 15, head[1] & 127  # RFC 6455, section 5.2; a server masks nothing
            if length > 125:
                format_ = "!H" if length == 126 else "!Q"
                (length,) = struct.unpack(format_, stream.read(struct.calcsize(format_)))
            if kind == 8 or length == 0:
                if kind == 8:
                    break
                continue
            channel = stream.read(1)[0]
            length -= 1
            if channel == STDOUT:
                count += length
                while length:
                    length -= stream.readinto(inside[: min(length, _BUFFER)])  # type: ignore[attr-defined]
            else:
                payload = stream.read(length)
                status = payload if channel == STATUS else status
        return count, status
