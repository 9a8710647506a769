"""Options of commands that reach a registry, or open what comes from one: logins, TLS, platforms, keys.

Refuses nothing but words that mean nothing. Invariant: importing it costs nothing: most commands of `ocid` reach none.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cri.cli.main import CommandError

if TYPE_CHECKING:
    from imagestore.model import Credentials, KeyFile


def authfile_argument(parser: argparse._ActionsContainer) -> None:
    """The `--authfile` option."""
    parser.add_argument("--authfile", metavar="FILE", help="logins, as podman login and docker login write them")


def tls_argument(parser: argparse._ActionsContainer, name: str = "--tls-verify") -> None:
    """The `--tls-verify` option, in skopeo's words."""
    parser.add_argument(
        name,
        metavar="true|false",
        default=True,
        type=_truth,
        help="false: the registry need not prove who it is, nor speak TLS (default: true)",
    )


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def platform_argument(parser: argparse._ActionsContainer) -> None:
    """The `--platform` option."""
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", help="of several, the one for this platform")


def keys_argument(parser: argparse._ActionsContainer) -> None:
    """The `--decryption-key` option."""
    parser.add_argument(
        "--decryption-key",
        action="append",
        default=[],
        metavar="FILE[:PASSWORD]",
        help="a private key that opens encrypted layers; PASSWORD, file=FILE or fd=N where it has one; or "
        "provider:NAME[:PARAMETER], a program of image.key_providers; may be repeated",
    )


def given_keys(args: argparse.Namespace) -> tuple[KeyFile, ...]:
    """What `--decryption-key` names. Raises CommandError."""
    if not args.decryption_key:
        return ()
    from imagestore.encryption.keys import key_files
    from imagestore.model import ImageError

    try:
        return key_files(args.decryption_key)
    except ImageError as error:
        raise CommandError(str(error)) from None


def packed(keys: tuple[KeyFile, ...]) -> bytes:
    """The keys as they go along with a call."""
    if not keys:
        return b""
    from imagestore.encryption.keys import pack

    return pack(keys)


def credentials(creds: str | None) -> Credentials | None:
    """USER:PASSWORD of an option."""
    from imagestore.model import Credentials

    user, _, password = (creds or "").partition(":")
    return Credentials(user, password) if creds else None
