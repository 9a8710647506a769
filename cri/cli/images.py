"""`ocid images`: what is in the store; with --disk what that takes there, and what of it images share."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from cri.api import api_pb2 as pb
from cri.cli import filters, output
from cri.cli.connect import connect
from cri.cli.template import Template
from imagestore.artifacts import ARTIFACT_TYPE
from imagestore.model import ReferenceInvalid
from imagestore.reference import parse

# A tag is all that makes an image more than what was pulled by its digest.
_FILTERS = {
    "reference": lambda image, value: any(fnmatchcase(name, value) for name in _spellings(image)),
    "dangling": lambda image, value: (not image.repo_tags) == (value.lower() in ("true", "1")),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="all of them, as always")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the ids")
    parser.add_argument("--no-trunc", action="store_true", help="whole ids")
    parser.add_argument("--digests", action="store_true", help="also by which digest each name came")
    filters.argument(parser, tuple(_FILTERS))
    parser.add_argument(
        "-d", "--disk", action="store_true", help="what each takes on disk, and what is its own of that"
    )
    output.format_argument(parser, templates=True)
    parser.add_argument("name", nargs="?", help="only the names of this repository, or this one name")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        listed = _wanted(args, (await api.call("ListImages", pb.ListImagesRequest())).images)
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
        _table(args, listed)
    return 0


def _wanted(args: argparse.Namespace, listed: Sequence[pb.Image]) -> list[pb.Image]:
    """The images that the options let through, each with those of its names that they name."""
    holds = filters.matching(args.filter, _FILTERS)
    images = [image for image in listed if holds(image)]
    for image in images if args.name else ():
        names = (image.repo_tags, image.repo_digests)
        for some in names:
            some[:] = [name for name in some if _is_called(name, args.name)]
    return [image for image in images if not args.name or image.repo_tags or image.repo_digests]


def _is_called(name: str, wanted: str) -> bool:
    """True for a name of `wanted`'s repository, and its tag or digest where it has one; docker.io may be left out."""
    try:
        asked = parse(wanted)
    except ReferenceInvalid:
        return False
    of_all = not asked.digest and not wanted.endswith(f":{asked.tag}")
    return name.partition("@")[0].rpartition(":")[0] == asked.repository if of_all else name == str(asked)


def _table(args: argparse.Namespace, listed: Sequence[pb.Image]) -> None:
    rows = []
    for image in listed:
        digests = dict(digest.split("@", 1) for digest in image.repo_digests)
        id_ = image.id if args.no_trunc else image.id.removeprefix("sha256:")[:12]
        for name in list(image.repo_tags) or list(image.repo_digests)[:1] or ["-"]:
            digest = digests.get(name.partition("@")[0].rpartition(":")[0], "-")
            rows.append((name, *((digest,) if args.digests else ()), id_, output.size(image.size)))
    output.table(("IMAGE", *(("DIGEST",) if args.digests else ()), "ID", "SIZE"), sorted(rows))


def _spellings(image: pb.Image) -> list[str]:
    """Its names, also as they are typed: without docker.io/library, and without the tag."""
    full = [name for tag in image.repo_tags for name in (tag, tag.rpartition(":")[0])]
    return [form for name in full for form in (name, name.removeprefix("docker.io/").removeprefix("library/"))]


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
