"""`ocid pull`: an image into the store, verified and unpacked.

Refuses to print progress anywhere but on a terminal. Invariant: the last line is the image's id.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from cri.api import api_pb2 as pb
from cri.cli.connect import Api, connect


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="log in to the registry with these")
    parser.add_argument("image", help="reference, such as docker.io/library/nginx:1.27 or host:5000/app@sha256:…")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(args) as api:
        print(await pull(api, args.image, creds=args.creds))
    return 0


async def pull(api: Api, image: str, *, creds: str | None = None) -> str:
    """Pulls and returns the image's id; shows bars on a terminal when the work is done in this process."""
    if api.local is not None and sys.stderr.isatty():
        return await _pull_with_bars(api, image, creds)
    request = pb.PullImageRequest(image=pb.ImageSpec(image=image))
    if creds:
        request.auth.username, _, request.auth.password = creds.partition(":")
    return str((await api.call("PullImage", request)).image_ref)


async def _pull_with_bars(api: Api, image: str, creds: str | None) -> str:
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    from imagestore.model import Credentials, ImageError
    from imagestore.model import Progress as Step

    bars: dict[str, TaskID] = {}
    user, _, password = (creds or "").partition(":")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, refresh_per_second=8) as display:

        def show(step: Step) -> None:
            name = step.digest.removeprefix("sha256:")[:12]
            if step.digest not in bars:
                bars[step.digest] = display.add_task(f"{name} {step.phase}", total=step.total)
            display.update(bars[step.digest], completed=step.done, total=step.total, description=f"{name} {step.phase}")

        try:
            pulled = await api.local.images.pull(image, Credentials(user, password) if creds else None, show)
        except ImageError as error:
            from cri.cli.main import CommandError

            raise CommandError(str(error)) from None
    return str(pulled.id)
