"""An HTTP proxy that knows CONNECT only, and leads wherever it is told, whatever name it is asked for.

with ConnectProxy("127.0.0.1", 5000) as proxy:   proxy.url, proxy.asked: the heads of all requests, as bytes
"""

from __future__ import annotations

import select
import socket
import socketserver
import threading
from types import TracebackType

_HEAD = 16 << 10


class ConnectProxy:
    """Serves between enter and exit."""

    def __init__(self, host: str, port: int, answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> None:
        self.asked: list[bytes] = []
        asked = self.asked

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                head = b""
                while b"\r\n\r\n" not in head and len(head) < _HEAD:
                    piece = self.request.recv(4096)
                    if not piece:
                        return
                    head += piece
                asked.append(head)
                self.request.sendall(answer)
                if b" 200 " in answer:
                    with socket.create_connection((host, port)) as far:
                        _both_ways(self.request, far)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ConnectProxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _both_ways(near: socket.socket, far: socket.socket) -> None:
    """Until either side has ended."""
    while True:
        ready, _, _ = select.select([near, far], [], [])
        for one in ready:
            piece = one.recv(1 << 16)
            if not piece:
                return
            (far if one is near else near).sendall(piece)
