"""`ocid doctor`: verifies every blob, unpacked layer, snapshot and record of the images, and whether ocid and ocirun
still go on from their dumps; with --repair fetches what is damaged again from where it came, and installs those anew,
with --deep unpacks every image once more and compares. The exit code is 0 when nothing is wrong (any more), else 1."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping

from cri import renewal
from cri.api import api_pb2 as pb
from cri.cli import output
from cri.cli.connect import Api, connect
from cri.cli.main import CommandError
from cri.cli.verify import deep_differences
from cri.config import Config


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="throw away what is damaged and fetch it again")
    parser.add_argument(
        "--deep", action="store_true", help="look into unpacked files, too, as ocid verify --deep does for one image"
    )
    output.format_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        answer = await api.own("Check", {"repair": args.repair})
        images = await _manifests(api) if args.deep else {}
    problems, left = answer["problems"], answer["left"]
    if images:
        found, layers = await _files(api.config, images)
        problems, again = problems + found, found
        if layers and args.repair:
            async with connect(args) as api:
                left += (await api.own("Check", {"repair": True, "layers": layers}))["left"]
            again, _ = await _files(api.config, {image: images[image] for image in {one["image"] for one in found}})
        left = left + again
    for command, reason in renewal.stale().items():
        name, why = str(renewal.library(command) / command), reason
        problems = [*problems, {"kind": "command", "name": name, "what": f"starts slowly: {why}", "image": ""}]
        if not args.repair or (why := await renewal.renew(command)):
            left = [*left, {"kind": "command", "name": name, "what": f"starts slowly: {why}", "image": ""}]
    if args.format == "json":
        output.as_json({"problems": problems, "left": left})
    else:
        if problems:  # what several images need is wrong for each of them, and told once
            rows = dict.fromkeys((one["kind"], one["name"], one["what"]) for one in problems)
            output.table(("KIND", "NAME", "WHAT"), list(rows))
        if args.repair and problems:
            print("repaired" if not left else "still wrong:")
            for one in left:
                print(f"  {one['kind']} {one['name']}: {one['what']}")
        elif not problems:
            print("everything is as it is recorded")
    return 1 if left else 0


async def _manifests(api: Api) -> dict[str, str]:
    """The digest of each image's manifest, by its id."""
    found = {}
    for image in (await api.call("ListImages", pb.ListImagesRequest())).images:
        asked = pb.ImageStatusRequest(image=pb.ImageSpec(image=image.id), verbose=True)
        answer = await api.call("ImageStatus", asked)
        if answer.HasField("image"):
            found[image.id] = str(json.loads(answer.info["info"])["manifestDigest"])
    return found


async def _files(config: Config, images: Mapping[str, str]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """What of unpacked files is not as it should be; and the layers that are concerned, each with an image."""
    found: list[dict[str, str]] = []
    layers: dict[str, str] = {}
    for image, manifest in images.items():
        try:
            deep = await asyncio.to_thread(deep_differences, config, manifest, ())
            told = deep.told
            layers |= dict.fromkeys(deep.layers, image)
        except CommandError as error:  # no key of this node opens it, perhaps: the others are looked at all the same
            told = [str(error)]
        found += [{"kind": "files", "name": image, "what": what, "image": image} for what in told]
    return found, layers
