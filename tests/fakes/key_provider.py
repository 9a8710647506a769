"""A key provider of ocicrypt's protocol, run as a program: by our image store and by skopeo.

    key_provider.py DIRECTORY

DIRECTORY/secret is what it wraps with, DIRECTORY/asked gets a line of JSON for each request. It wraps by HMAC-SHA-256
as a stream, and refuses packets that another secret has wrapped. DIRECTORY/answer, where there is one, is what it says;
with a DIRECTORY/silent it says nothing and does not end, and DIRECTORY/silent has a file called by its pid.
It imports little, since many are started.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sys
from binascii import a2b_base64, b2a_base64


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
    home = sys.argv[1]
    request = json.load(sys.stdin)
    with open(f"{home}/asked", "a", encoding="utf-8") as log:
        log.write(json.dumps(request) + "\n")
    if os.path.exists(f"{home}/silent"):
        import signal

        open(f"{home}/silent/{os.getpid()}", "x").close()
        signal.pause()
    if os.path.exists(f"{home}/answer"):
        with open(f"{home}/answer", encoding="utf-8") as answer:
            sys.stdout.write(answer.read())
        return
    with open(f"{home}/secret", "rb") as file:
        secret = file.read()
    if request["op"] == "keywrap":
        packet = wrap(secret, a2b_base64(request["keywrapparams"]["optsdata"]))
        print(json.dumps({"keywrapresults": {"annotation": b2a_base64(packet, newline=False).decode()}}))
    else:
        plain = unwrap(secret, a2b_base64(request["keyunwrapparams"]["annotation"]))
        print(json.dumps({"keyunwrapresults": {"optsdata": b2a_base64(plain, newline=False).decode()}}))


if __name__ == "__main__":
    main()
