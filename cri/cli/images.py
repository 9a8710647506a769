"""`ocid images`: what is in the store; with --disk what that takes there, and what of it images share."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from cri.api import api_pb2 as pb
from cri.cli import output
from cri.cli.connect import connect
from cri.cli.template import Template
from imagestore.artifacts import ARTIFACT_TYPE


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="only the ids")
    parser.add_argument(
        "-d", "--disk", action="store_true", help="what each takes on disk, and what is its own of that"
    )
    output.format_argument(parser, templates=True)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        listed = (await api.call("ListImages", pb.ListImagesRequest())).images
        disk = await api.own("Sharing", {}) if args.disk else None
    if args.format not in output.FORMATS and not args.quiet:
        template = Template(args.format)
        for row in _rows(listed):
            print(template.render(row))
    elif disk is not None and not args.quiet:
        _disk(args.format, listed, disk)
    elif args.quiet:
        for image in listed:
            print(image.id)
    elif args.format == "json":
        output.as_json(
            [
                {
                    "id": image.id,
                    "tags": list(image.repo_tags),
                    "digests": list(image.repo_digests),
                    "size": image.size,
                    "pinned": image.pinned,
                    "artifact": image.spec.annotations.get(ARTIFACT_TYPE, ""),
                }
                for image in listed
            ]
        )
    else:
        rows = [
            (name, image.id.removeprefix("sha256:")[:12], output.size(image.size))
            for image in listed
            for name in (list(image.repo_tags) or list(image.repo_digests)[:1] or ["-"])
        ]
        output.table(("IMAGE", "ID", "SIZE"), sorted(rows))
    return 0


def _rows(listed: Sequence[pb.Image]) -> list[dict[str, Any]]:
    """A row for each name, in docker's words."""
    found = []
    for image in listed:
        digests = {digest.partition("@")[0]: digest.partition("@")[2] for digest in image.repo_digests}
        names = [name.rpartition(":") for name in image.repo_tags] or [(name, "", "<none>") for name in digests]
        for repository, _, tag in names or [("<none>", "", "<none>")]:
            found.append(
                {
                    "Repository": repository,
                    "Tag": tag,
                    "Digest": digests.get(repository, "<none>"),
                    "ID": image.id.removeprefix("sha256:")[:12],
                    "Size": output.size(image.size),
                    "Pinned": image.pinned,
                    "Artifact": image.spec.annotations.get(ARTIFACT_TYPE, ""),
                }
            )
    return sorted(found, key=lambda row: (row["Repository"], row["Tag"]))


def _disk(form: str, listed: Sequence[pb.Image], disk: Mapping[str, Any]) -> None:
    """Blobs and unpacked layers of each image; what several have is there once."""
    found = {one["image"]: one for one in disk["images"]}
    apart = sum(one["bytes"] for one in disk["images"])
    if form == "json":
        output.as_json({"images": disk["images"], "bytes": disk["bytes"], "bytes_unshared": apart})
        return
    rows = [
        (name, image.id.removeprefix("sha256:")[:12], *(output.size(found[image.id][key]) for key in ("bytes", "own")))
        for image in listed
        if image.id in found
        for name in (list(image.repo_tags) or list(image.repo_digests)[:1] or ["-"])
    ]
    output.table(("IMAGE", "ID", "DISK", "OWN"), sorted(rows))
    together = output.size(disk["bytes"])
    print(f"{len(found)} images take {together}; were nothing shared, it would be {output.size(apart)}")
