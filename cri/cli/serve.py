"""`ocid serve`: the daemon, in the foreground.

Refuses to daemonise: that is the service manager's. Invariant: SIGTERM ends it and no container with it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses

from cri.cli.connect import configuration


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", metavar="ADDRESS", help="where the CRI is served (default: unix://STATE/ocid.sock)")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), help="how much to log (default: info)"
    )


def run(args: argparse.Namespace) -> int:
    from cri.daemon import serve

    config = configuration(args)
    given = {"listen": args.listen, "log_level": args.log_level}
    config = dataclasses.replace(config, **{key: value for key, value in given.items() if value})
    asyncio.run(serve(config))
    return 0
