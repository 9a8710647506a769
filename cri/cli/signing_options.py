"""Options about the signatures of what is copied, in skopeo's words; and files that hold keys and passwords.

Refuses a password on the command line, where everybody on the machine reads it. Invariant: importing it costs nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cri.cli.main import CommandError

if TYPE_CHECKING:
    from imagestore.signing import Signer

_LIMIT = 1 << 20


def signature_arguments(parser: argparse.ArgumentParser) -> None:
    """What becomes of signatures in a copy."""
    parser.add_argument("--remove-signatures", action="store_true", help="leave the source's signatures behind")
    parser.add_argument(
        "--sign-by-sigstore-private-key",
        metavar="FILE",
        help="sign what is copied with this key: ECDSA, RSA or Ed25519, in PEM, or as cosign keeps it",
    )
    parser.add_argument("--sign-passphrase-file", metavar="FILE", help="what the key is encrypted with")


def given_signer(args: argparse.Namespace) -> Signer | None:
    """By whom to sign. Raises CommandError, ImageError."""
    if not args.sign_by_sigstore_private_key:
        if args.sign_passphrase_file:
            raise CommandError("--sign-passphrase-file goes with --sign-by-sigstore-private-key")
        return None
    from imagestore.signing import load_signer

    password = read_file(args.sign_passphrase_file).rstrip(b"\n")
    return load_signer(read_file(args.sign_by_sigstore_private_key), password or None)


def read_file(path: str | None) -> bytes:
    """The content of a small file, nothing where none is named. Raises CommandError."""
    if not path:
        return b""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError as error:
        raise CommandError(f"read {path}: {(error.strerror or str(error)).lower()}") from None
    if not data or len(data) > _LIMIT:
        raise CommandError(f"read {path}: it is {'empty' if not data else f'larger than {_LIMIT} bytes'}")
    return data
