"""A key provider of ocicrypt's protocol, run as a program: by our image store and by skopeo.

    key_provider.py DIRECTORY

DIRECTORY/secret is what it wraps with, DIRECTORY/asked gets a line of JSON for each request. It wraps by HMAC-SHA-256
as a stream, and refuses packets that another secret has wrapped. DIRECTORY/answer, where there is one, is what it says;
with a DIRECTORY/silent it says nothing and does not end, and DIRECTORY/silent has a file called by its pid.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import signal
import sys
from pathlib import Path


def stream(secret: bytes, nonce: bytes, data: bytes) -> bytes:
    key = b"".join(hmac.digest(secret, nonce + bytes([n]), "sha256") for n in range(len(data) // 32 + 1))
    return bytes(a ^ b for a, b in zip(data, key, strict=False))


def wrap(secret: bytes, data: bytes) -> bytes:
    nonce = os.urandom(16)
    hidden = nonce + stream(secret, nonce, data)
    return hidden + hmac.digest(secret, hidden, hashlib.sha256)


def unwrap(secret: bytes, packet: bytes) -> bytes:
    hidden, mac = packet[:-32], packet[-32:]
    if not hmac.compare_digest(hmac.digest(secret, hidden, hashlib.sha256), mac):
        sys.exit("SECRET: not wrapped by me")
    return stream(secret, hidden[:16], hidden[16:])


def main() -> None:
    home = Path(sys.argv[1])
    request = json.load(sys.stdin)
    with (home / "asked").open("a") as log:
        log.write(json.dumps(request) + "\n")
    if (home / "silent").exists():
        (home / "silent" / str(os.getpid())).touch()
        signal.pause()
    if (home / "answer").exists():
        sys.stdout.write((home / "answer").read_text())
        return
    secret = (home / "secret").read_bytes()
    if request["op"] == "keywrap":
        packet = wrap(secret, base64.b64decode(request["keywrapparams"]["optsdata"]))
        print(json.dumps({"keywrapresults": {"annotation": base64.b64encode(packet).decode()}}))
    else:
        plain = unwrap(secret, base64.b64decode(request["keyunwrapparams"]["annotation"]))
        print(json.dumps({"keyunwrapresults": {"optsdata": base64.b64encode(plain).decode()}}))


if __name__ == "__main__":
    main()
