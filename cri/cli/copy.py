"""`ocid copy`: an image from one place to another, byte by byte verified, without unpacking it.

    docker://REF   oci:DIR[:TAG]   oci-archive:FILE[:TAG]   docker-archive:FILE[:REF]   dir:DIR   ocid:NAME (the store)

Refuses options that contradict one another. Invariant: the last line is the digest that the image has at the target.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from cri.cli.bars import bars
from cri.cli.main import CommandError
from cri.cli.places import (
    access,
    copying,
    is_store,
    store_root,
    stored_digest,
)
from cri.cli.registry_options import (
    authfile_argument,
    given_keys,
    keys_argument,
    platform_argument,
    tls_argument,
)
from cri.cli.signing_options import given_signer, signature_arguments
from imagestore.copying.copy import CopyOptions
from imagestore.copying.places import Place, parse_place
from imagestore.copying.session import Session, beside
from imagestore.encryption.keys import recipients
from imagestore.model import ImageError, ReferenceInvalid
from imagestore.registry import Document
from imagestore.source import Source


def arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-a", "--all", action="store_true", help="every platform of an index, and the index")
    platform_argument(which)
    parser.add_argument("--compress", choices=("gzip", "zstd", "none"), default="", help="every layer compressed so")
    side_arguments(parser)
    authfile_argument(parser)
    keys_argument(parser)
    parser.add_argument(
        "--encryption-key",
        action="append",
        default=[],
        metavar="jwe:FILE|pkcs7:FILE|provider:NAME[:PARAMETER]",
        help="encrypt every layer for whoever has the private key to this public key or certificate, or by a program "
        "of image.key_providers; may be repeated",
    )
    signature_arguments(parser)
    parser.add_argument("--sign-identity", metavar="NAME:TAG", default="", help="sign as this (default: the target)")
    parser.add_argument("--insecure-policy", action="store_true", help="do not ask the signature policy of the source")
    parser.add_argument("--digestfile", metavar="FILE", help="write the digest there, too")
    parser.add_argument("source", help="from where, such as docker://docker.io/library/busybox:1 or oci:DIR:TAG")
    parser.add_argument("target", help="to where, such as docker://localhost:5000/busybox:1 or oci-archive:FILE")


def side_arguments(parser: argparse.ArgumentParser) -> None:
    """What becomes of manifests, and how the registries of both sides are reached."""
    parser.add_argument("--format", choices=("oci", "docker"), default="", help="manifests in this format")
    parser.add_argument("--preserve-digests", action="store_true", help="fail if anything would have to change")
    for side, of in (("src", "source"), ("dest", "target")):
        login = parser.add_mutually_exclusive_group()
        login.add_argument(f"--{side}-creds", metavar="USER:PASSWORD", help=f"log in to the {of}'s registry with these")
        login.add_argument(f"--{side}-no-creds", action="store_true", help="do not log in there")
        login.add_argument(f"--{side}-authfile", metavar="FILE", help="logins for there")
        tls_argument(parser, f"--{side}-tls-verify")


def run(args: argparse.Namespace) -> int:
    try:
        source, target = parse_place(args.source), parse_place(args.target)
    except ReferenceInvalid as error:
        raise CommandError(str(error)) from None
    digest = asyncio.run(_run(args, source, target))
    if args.digestfile:
        Path(args.digestfile).write_text(digest)
    print(digest)
    return 0


async def _run(args: argparse.Namespace, source: Place, target: Place) -> str:
    if is_store(target):
        from cri.cli.load import into_store

        return await into_store(args, source, target.name)
    digest = (await stored_digest(args, source.name, everything=args.all))[0] if is_store(source) else ""
    async with copying(args, beside(target)) as session:
        if digest:
            origin = session.stored(store_root(args), digest)
        else:
            origin = await session.source(source, access(args, "src_"))
        made = await transfer(args, session, (source, origin), target, copy_options(args, session, target))
    return made.digest


async def transfer(
    args: argparse.Namespace, session: Session, of: tuple[Place, Source], target: Place, options: CopyOptions
) -> Document:
    """One image, with the policy's consent and its signatures, to where it is visible. Raises ImageError."""
    source, origin = of
    admit = None
    if not is_store(source) and not args.insecure_policy:
        admit = await session.policy(source, origin)
    to = await session.target(target, source, access(args, "dest_"))
    remove, signer = args.remove_signatures, given_signer(args)
    carrying = session.carrying(origin, target, to, remove=remove, signer=signer, name=args.sign_identity)
    with bars() as show:
        made = await session.copy(origin, to, options, show, admit, carrying)
        await to.finish()
    return made


def copy_options(args: argparse.Namespace, session: Session, target: Place) -> CopyOptions:
    # A registry is sent compressed layers, as everybody does; files are left as they are.
    compress = args.compress or ("plain" if target.kind == "docker" and not args.preserve_digests else "")
    try:
        to = recipients(args.encryption_key)
    except ImageError as error:
        raise CommandError(str(error)) from None
    platform, keys = session.config.platform, given_keys(args)
    return CopyOptions(platform, args.all, args.format, compress, args.preserve_digests, keys, to)
