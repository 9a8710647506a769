"""`ocid inspect`: a container's or an image's status with all its details, as JSON; an image that is elsewhere
(docker://…, oci:…, …) in skopeo's words, without pulling it."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cri.api import api_pb2 as pb
from cri.cli import addresses, names, output
from cri.cli.connect import Api, connect
from cri.cli.main import CommandError
from cri.cli.registry_options import authfile_argument, platform_argument, tls_argument
from cri.cli.template import Template, Time
from imagestore.copying.places import KINDS, Place

if TYPE_CHECKING:
    from imagestore.copying.session import Access, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="+", help="container name or id, image reference, or docker://…, oci:…, dir:…")
    parser.add_argument(
        "-f", "--format", metavar="TEMPLATE", help="print each by a Go template, such as '{{.Digest}}' or '{{json .}}'"
    )
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="log in to the registry with these")
    authfile_argument(parser)
    tls_argument(parser)
    parser.add_argument("-n", "--no-tags", action="store_true", help="with docker://…: do not ask for the list of tags")
    platform_argument(parser)


def run(args: argparse.Namespace) -> int:
    # A place begins with its kind and a colon; "docker:dind" is a reference, and no kind has one without slashes.
    elsewhere = [name for name in args.name if name.partition(":")[0] in KINDS and not name.startswith("ocid:")]
    if len(elsewhere) == len(args.name) and all("/" in name or not name.startswith("docker:") for name in elsewhere):
        return asyncio.run(_elsewhere(args))
    return asyncio.run(_run(args))


async def _elsewhere(args: argparse.Namespace) -> int:
    addresses.random()
    from cri.cli.manifest import place_of
    from cri.cli.places import access, copying
    from imagestore.copying.inspect import inspect
    from imagestore.reference import parse

    found = []
    async with copying(args, None) as session:
        for name in args.name:
            place = place_of(name)
            source = await session.source(place, access(args))
            called = parse(place.name).repository if place.kind == "docker" else ""
            known = [] if args.no_tags or not called else await _tags(session, place, access(args))
            found.append(await inspect(source, called, known, session.scratch, session.threads, session.config))
    if args.format:
        _print(args.format, [_for_template(one) for one in found])
    else:
        output.as_json(found[0] if len(found) == 1 else found)
    return 0


async def _tags(session: Session, place: Place, reached: Access) -> list[str]:
    """None where the registry does not tell: many tell nobody."""
    from imagestore.copying.inspect import tags
    from imagestore.model import ImageError

    try:
        return await tags(await session.repository(place, reached, "pull"), session.config)
    except ImageError:
        return []


async def _run(args: argparse.Namespace) -> int:
    from google.protobuf.json_format import MessageToDict

    found = []
    async with connect(args) as api:
        for wanted in args.name:
            response: Any
            more: dict[str, Any] = {}
            try:
                container = await names.find(api, wanted)
                request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
                response = await api.call("ContainerStatus", request)
                status = response.status
                more = {"pod": await _pod(api, container.pod_sandbox_id)}
            except CommandError as error:
                image = pb.ImageStatusRequest(image=pb.ImageSpec(image=wanted), verbose=True)
                response = await api.call("ImageStatus", image)
                if not response.HasField("image"):
                    raise CommandError(f"there is neither a container nor an image {wanted!r}", 1) from error
                status = response.image
            info = {key: _decoded(value) for key, value in response.info.items()}
            found.append({"status": MessageToDict(status), **more, **info})
    if args.format:
        _print(args.format, found)
    else:
        output.as_json(found)
    return 0


def _for_template(found: Mapping[str, Any]) -> dict[str, Any]:
    """As Go's values of it are printed: a time is none of JSON's, and what is missing is an empty map."""
    return {**found, "Created": Time(found["Created"]) if found["Created"] else None, "Labels": found["Labels"] or {}}


def _print(text: str, documents: Sequence[Mapping[str, Any]]) -> None:
    template = Template(text)
    for document in documents:
        print(template.render(document))


async def _pod(api: Api, id: str) -> dict[str, Any]:
    """Where the container is reached: its pod's addresses, and the ports of the host that lead to it."""
    response = await api.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=id, verbose=True))
    config = _decoded(response.info["info"])["config"]
    network = response.status.network
    return {
        "id": id,
        "addresses": [address for address in (network.ip, *(one.ip for one in network.additional_ips)) if address],
        "ports": config.get("port_mappings", []),
    }


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
