"""`ocid verify`: does the signature policy accept an image, and why; with --deep, is what is unpacked as it should be.

Refuses to change anything. Invariant: exit code 0 means accepted (and untouched), 1 refused (or touched), 125 that it
could not be told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cri.cli import output
from cri.cli.main import CommandError
from cri.cli.registry_options import given_keys, keys_argument
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    from cri.config import Config
    from imagestore.deep import Seals
    from imagestore.model import KeyFile


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", metavar="FILE", help="judge by this policy.json instead of the configured one")
    parser.add_argument(
        "--deep",
        action="store_true",
        help="look at the unpacked layers of an image that is here instead: unpack it once more and compare",
    )
    keys_argument(parser)
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="log in to the registry with these")
    output.format_argument(parser)
    parser.add_argument("image", help="an image in a registry; with --deep one that was pulled")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_deep(args) if args.deep else _verify(args))


async def _verify(args: argparse.Namespace) -> int:
    from cri.cli.connect import configuration
    from cri.cli.registry_options import credentials
    from cri.image_config import store_config
    from imagestore.model import ImageError
    from imagestore.verification import reaching, verify

    config = store_config(configuration(args))
    if args.policy:
        config = replace(config, policy=Path(args.policy).absolute())
    try:
        async with reaching(config) as reach:
            verdict = await verify(reach, args.image, credentials(args.creds))
    except ImageError as error:
        raise CommandError(str(error)) from None
    if args.format == "json":
        output.as_json(as_document(verdict))
    else:
        print("\n".join(as_text(verdict)))
    return 0 if verdict.accepted else 1


def as_text(verdict: Any) -> list[str]:
    """The verdict in plain words."""
    lines = [
        f"{verdict.subject}: {'accepted' if verdict.accepted else 'REFUSED'} by the requirements of {verdict.scope}"
    ]
    lines += [f"  digest   {digest}" for digest in verdict.digests]
    for outcome in verdict.outcomes:
        if outcome.met:
            lines.append(f"  met      {outcome.sentence()}")
        else:
            lines.append(f"  not met  {outcome.requirement.type}")
            lines += [f"           {reason}" for reason in outcome.reasons]
    return [output.plain(line) for line in lines]


def as_document(verdict: Any) -> dict[str, Any]:
    """The verdict as JSON."""
    return {
        "image": str(verdict.subject),
        "accepted": verdict.accepted,
        "scope": verdict.scope,
        "digests": list(verdict.digests),
        "requirements": [
            {
                "type": outcome.requirement.type,
                "met": outcome.met,
                "by": outcome.by,
                "signature": outcome.origin,
                "digest": outcome.claim.digest if outcome.claim else "",
                "name": outcome.claim.name if outcome.claim else "",
                "reasons": list(outcome.reasons),
            }
            for outcome in verdict.outcomes
        ],
    }


async def _deep(args: argparse.Namespace) -> int:
    from cri.api import api_pb2 as pb
    from cri.cli.connect import connect

    async with connect(args) as api:
        asked = pb.ImageStatusRequest(image=pb.ImageSpec(image=args.image), verbose=True)
        answer = await api.call("ImageStatus", asked)
    if not answer.HasField("image"):
        raise CommandError(f"image {args.image!r} is not here; pull it first")
    manifest = json.loads(answer.info["info"])["manifestDigest"]
    found = await asyncio.to_thread(deep_differences, api.config, manifest, given_keys(args))
    differences, seals = found.told, found.seals
    if args.format == "json":
        output.as_json(
            {"image": answer.image.id, "manifest": manifest, "differences": differences, "fsVerity": asdict(seals)}
        )
    else:
        print(f"fs-verity: {seals}")
        for line in differences:
            print(output.plain(line))
        count = f"{len(differences)} difference{'s' if len(differences) > 1 else ''}"
        print(f"{args.image}: {count if differences else 'as its diff ids say'}")
    return 1 if differences else 0


@dataclass(frozen=True, slots=True)
class Deep:
    """What differs, in sentences; the chain ids of the layers that do; which blobs the kernel checks."""

    told: list[str]
    layers: frozenset[str]
    seals: Seals


def deep_differences(config: Config, manifest: str, keys: tuple[KeyFile, ...]) -> Deep:
    """What of an image's unpacked layers is not as its diff ids say, and which of its blobs the kernel checks; blocks.
    Raises CommandError."""
    from cri.image_config import store_config
    from imagestore.artifacts import unpack_type
    from imagestore.content import Blobs
    from imagestore.deep import layers_of, seals
    from imagestore.encryption.layers import Opener
    from imagestore.model import ImageError
    from snapshotter.model import SnapshotError
    from snapshotter.recheck import Checked, directories, recheck

    root = config.root
    blobs = Blobs(root / "images")
    try:
        layers, damaged = layers_of(blobs, manifest)
        sealed = seals(blobs, (manifest, *(one.blob.digest for one in layers)))
        if damaged:
            return Deep(damaged, frozenset(), sealed)
        store = store_config(config)
        opened = Opener(store.decryption_keys, store.key_providers).open(layers, keys)
        checked = [
            Checked(
                blobs.path(one.blob.digest),
                unpack_type(one),
                one.diff_id,
                one.chain_id,
                opened.get(one.chain_id),
            )
            for one in layers
        ]
        found = list(recheck(_scratch(root), checked, directories(root / "ocid.db", root / "snapshots")))
        return Deep([what for _, what in found], frozenset(chain_id for chain_id, _ in found), sealed)
    except (ImageError, SnapshotError, OSError) as error:
        raise CommandError(str(error)) from None


def _scratch(root: Path) -> Path:
    """Where to unpack to. What one that was killed has left goes first."""
    from runtime.linux.files import remove_tree

    for old in root.glob("verify-*"):
        if not Path(f"/proc/{old.name.removeprefix('verify-')}").exists():
            remove_tree(old)
    return root / f"verify-{os.getpid()}"
