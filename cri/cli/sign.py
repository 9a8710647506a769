"""`ocid sign`: signs an image in a registry, with a key or with an identity.

Refuses to take a token or a password on the command line, where everybody on the machine reads it. Invariant: what it
prints was made, and is where it says.
"""

from __future__ import annotations

import argparse
import asyncio

from cri.cli import output
from cri.cli.main import CommandError
from cri.cli.signing_options import read_file


def arguments(parser: argparse.ArgumentParser) -> None:
    by = parser.add_argument_group("by what, one of")
    by.add_argument("--key", metavar="FILE", help="private key: ECDSA, RSA or Ed25519, in PEM, or as cosign keeps it")
    by.add_argument("--openpgp-key", metavar="FILE", help="OpenPGP secret key, as gpg --export-secret-keys writes it")
    by.add_argument("--identity-token", metavar="FILE", help="OIDC token, for a certificate from --fulcio-url")
    parser.add_argument("--password-file", metavar="FILE", help="what the key is encrypted with")
    parser.add_argument("--fulcio-url", metavar="URL", default="", help="who certifies identities")
    parser.add_argument("--rekor-url", metavar="URL", default="", help="the log to enter signatures in")
    parser.add_argument("--rekor-version", choices=("1", "2"), default="1", help="which Rekor that is (default: 1)")
    parser.add_argument("--rekor-key", metavar="FILE", help="its public key, PEM, by which its answers are verified")
    parser.add_argument("--timestamp-url", metavar="URL", default="", help="who signs the time (RFC 3161), in bundles")
    parser.add_argument("--bundle", action="store_true", help="sigstore bundles as referrers, not cosign's tag")
    parser.add_argument("--lookaside", action="store_true", help="into the store of registries.d, not the registry")
    parser.add_argument("--as", dest="name", metavar="NAME:TAG", default="", help="what the signature calls the image")
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="log in to the registry with these")
    output.format_argument(parser)
    parser.add_argument("image", help="an image in a registry; all manifests of an index are signed, and the index")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    from cri.cli.connect import configuration
    from cri.cli.registry_options import credentials
    from cri.image_config import store_config
    from imagestore.model import ImageError
    from imagestore.sign_image import How, missing, sign
    from imagestore.verification import reaching

    password = read_file(args.password_file)
    how = How(
        key=read_file(args.key),
        openpgp=read_file(args.openpgp_key),
        password=password.rstrip(b"\n") if password else None,
        token=read_file(args.identity_token).decode("ascii", "replace").strip(),
        fulcio=args.fulcio_url,
        rekor=args.rekor_url,
        rekor_2=args.rekor_version == "2",
        log=read_file(args.rekor_key),
        stamper=args.timestamp_url,
        bundle=args.bundle,
        lookaside=args.lookaside,
        name=args.name,
    )
    if wrong := missing(how):
        raise CommandError(wrong)
    try:
        async with reaching(store_config(configuration(args))) as reach:
            done = await sign(reach, args.image, credentials(args.creds), how)
    except ImageError as error:
        raise CommandError(str(error)) from None
    if args.format == "json":
        output.as_json([{"digest": one.digest, "name": one.name, "where": one.where} for one in done])
    else:
        output.table(("DIGEST", "AS", "WHERE"), [(one.digest, one.name, one.where) for one in done])
    return 0
