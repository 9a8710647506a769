"""`ocid config`: the configuration in force, or every key with its default and meaning."""

from __future__ import annotations

import argparse

from cri.cli.connect import configuration


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--default", action="store_true", help="the documented defaults")


def run(args: argparse.Namespace) -> int:
    from cri import config_write

    print(config_write.default_toml() if args.default else config_write.as_toml(configuration(args)), end="")
    return 0
