"""An encrypted layer's bytes as they were before: AES-256 in counter mode, and an HMAC-SHA-256 of what is encrypted.

This is what ocicrypt writes (AES_256_CTR_HMAC_SHA256). The HMAC stands at the end, so plain bytes come out before it is
known whether they are right: whoever reads them may make files of them, and commits nothing before `finish` has
returned. Refuses everything else about encryption: which key it is has been found out elsewhere. Invariant: nothing of
the plain text or of the key is written anywhere by this module, and none of it is in a message.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from snapshotter.model import LayerKey, UnpackError

_PIECE = 256 << 10

Read = Callable[[int], bytes]


class Sealed:
    """`read` gives the encrypted bytes, b"" at their end and ever after."""

    def __init__(self, read: Read, key: LayerKey) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher  # only who has such a layer pays for it
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import CTR

        secret, nonce, self._expected = key
        if len(secret) != 32 or len(nonce) != 16:
            raise UnpackError("layer's key is not one of AES-256 with a nonce of 16 bytes")
        self._read = read
        self._decryptor = Cipher(AES(secret), CTR(nonce)).decryptor()
        self._hmac = hmac.new(secret, digestmod=hashlib.sha256)

    def read(self, size: int) -> bytes:
        """At most `size` plain bytes, b"" at the end."""
        data = self._read(size)
        self._hmac.update(data)
        return self._decryptor.update(data)

    def finish(self) -> None:
        """Raises UnpackError unless all that was there, read by then or not, has the announced HMAC."""
        while self.read(_PIECE):
            pass
        if not hmac.compare_digest(self._hmac.digest(), self._expected):
            raise UnpackError(
                "encrypted layer's HMAC is another than announced: it was altered, or the key is not its own"
            )
