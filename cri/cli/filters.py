"""`--filter KEY=VALUE` of the listings, as docker and podman read it.

Refuses keys that a listing does not know, naming those that it does. Invariant: of one key any value is enough, of
`label` all are needed, and of several keys each must hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from cri.cli.main import CommandError

T = TypeVar("T")


def argument(parser: argparse.ArgumentParser, keys: Sequence[str]) -> None:
    """The option, which may be repeated."""
    parser.add_argument(
        "-f",
        "--filter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"only those for which it holds; KEY is {', '.join(keys)}; may be repeated",
    )


def matching(given: Sequence[str], known: Mapping[str, Callable[[T, str], bool]]) -> Callable[[T], bool]:
    """What the options let through. Raises CommandError."""
    wanted: dict[str, list[str]] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if key not in known or not equals:
            raise CommandError(f"--filter: {text!r} is not KEY=VALUE with a KEY of {', '.join(known)}")
        wanted.setdefault(key, []).append(value)

    def holds(one: T) -> bool:
        return all(
            (all if key == "label" else any)(known[key](one, value) for value in values)
            for key, values in wanted.items()
        )

    return holds


def has_label(labels: Mapping[str, str], text: str) -> bool:
    """KEY, or KEY=VALUE."""
    key, equals, value = text.partition("=")
    return key in labels and (not equals or labels[key] == value)
