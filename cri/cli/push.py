"""`ocid push`: an image of the store into a registry; `ocid copy ocid:NAME docker://TARGET` in docker's words.

Refuses what `ocid copy` refuses. Invariant: the last line is the digest that the image has there.
"""

from __future__ import annotations

import argparse

from cri.cli.registry_options import authfile_argument, tls_argument


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="all that was pulled with --all-platforms")
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="log in to the registry with these")
    authfile_argument(parser)
    tls_argument(parser)
    parser.add_argument("image", help="reference, digest or id of an image that is here")
    parser.add_argument(
        "target", nargs="?", help="what to call it there, such as localhost:5000/app:1 (default: IMAGE)"
    )


def run(args: argparse.Namespace) -> int:
    from cri.cli import copy

    parser = argparse.ArgumentParser(prog="ocid push")
    copy.arguments(parser)
    words = ["--dest-tls-verify", str(args.tls_verify)]
    words += ["--all"] if args.all else []
    for option, value in (("--dest-creds", args.creds), ("--authfile", args.authfile)):
        words += [option, value] if value else []
    target = (args.target or args.image).removeprefix("docker://")
    shared = argparse.Namespace(config=args.config, root=args.root, state=args.state, debug=args.debug)
    return copy.run(parser.parse_args([*words, f"ocid:{args.image}", f"docker://{target}"], shared))
