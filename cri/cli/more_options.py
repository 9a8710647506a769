"""Options of `ocid run` in docker's words, beyond cri.cli.options: mounts by --mount, tmpfs, DNS, capabilities, limits.

Refuses what it cannot parse or the CRI would not take, naming the option. Pure: nothing is looked up but the working
directory, for relative sources.
"""

from __future__ import annotations

import argparse
import json
import os

from cri.api import api_pb2 as pb
from cri.cli.main import CommandError
from cri.cli.options import propagation
from cri.marks import TMPFS, ULIMITS
from cri.spec import by_annotation
from cri.spec.validate import InvalidRequest

_BIND = frozenset({"type", "source", "target", "readonly", "bind-propagation"})
_TMPFS = frozenset({"type", "target", "readonly", "tmpfs-size", "tmpfs-mode"})
_SAME = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--mount",
        action="append",
        default=[],
        metavar="type=bind|tmpfs,…",
        help="type=bind,source=SRC,target=DST[,readonly][,bind-propagation=rslave…], or "
        "type=tmpfs,target=DST[,tmpfs-size=64m][,tmpfs-mode=1777][,readonly]",
    )
    add(
        "--tmpfs",
        action="append",
        default=[],
        metavar="DST[:OPTION,…]",
        help="a filesystem in memory, size=64m for one",
    )
    add("--dns", action="append", default=[], metavar="IP", help="a name server, instead of this machine's")
    add("--dns-search", action="append", default=[], metavar="DOMAIN", help="where names without a dot are looked for")
    add("--dns-option", action="append", default=[], metavar="OPTION", help="an option of resolv.conf")
    add("--cap-add", action="append", default=[], metavar="CAPABILITY", help="give it this, or ALL")
    add("--cap-drop", action="append", default=[], metavar="CAPABILITY", help="take this from it, or ALL")
    add(
        "--ulimit",
        action="append",
        default=[],
        metavar="NAME=SOFT[:HARD]",
        help="a limit of its processes, such as nofile=1024:4096; -1 is none",
    )


def apply(config: pb.ContainerConfig, args: argparse.Namespace) -> None:
    """Sets capabilities, limits and tmpfs."""
    capabilities = config.linux.security_context.capabilities
    capabilities.add_capabilities.extend(_split(args.cap_add))
    capabilities.drop_capabilities.extend(_split(args.cap_drop))
    for word in args.ulimit:
        if "," in word or "=" not in word:
            raise CommandError(f"--ulimit: {word!r} is not NAME=SOFT[:HARD]")
    if args.ulimit:
        config.annotations[ULIMITS] = ",".join(args.ulimit)
    tmpfs: dict[str, str] = {}
    for word in args.tmpfs:
        path, _, options = word.partition(":")
        _absolute("--tmpfs", word, path)
        tmpfs[path] = options
    for word in args.mount:
        fields = _fields(word)
        if fields["type"] == "tmpfs":
            options = [f"{name}={fields[f'tmpfs-{name}']}" for name in ("size", "mode") if f"tmpfs-{name}" in fields]
            tmpfs[fields["target"]] = ",".join([*options, *(["ro"] if _is_set(word, fields) else [])])
    if tmpfs:
        config.annotations[TMPFS] = json.dumps(tmpfs)
    for option, mark, read in (("--ulimit", ULIMITS, by_annotation.rlimits), ("--tmpfs", TMPFS, by_annotation.tmpfs)):
        try:
            read(config.annotations)
        except InvalidRequest as error:  # here, before an image is fetched, and in the words of who asked
            raise CommandError(str(error).replace(f"annotations[{mark}]", option)) from None


def dns(config: pb.DNSConfig, args: argparse.Namespace) -> None:
    """Sets what resolv.conf has."""
    config.servers.extend(args.dns)
    config.searches.extend(args.dns_search)
    config.options.extend(args.dns_option)


def binds(words: list[str]) -> list[pb.Mount]:
    """The --mount that are of type bind."""
    found = []
    for word in words:
        fields = _fields(word)
        if fields["type"] != "bind":
            continue
        if not fields.get("source"):
            raise CommandError(f"--mount: {word!r} has no source=")
        mount = pb.Mount(host_path=os.path.join(os.getcwd(), fields["source"]), container_path=fields["target"])
        mount.readonly = _is_set(word, fields)
        if how := fields.get("bind-propagation"):
            mount.propagation = propagation("--mount", word, how)
        found.append(mount)
    return found


def _fields(word: str) -> dict[str, str]:
    """ "type=bind,src=A,dst=B,ro" by docker's longest names; a name without a value has "" """
    fields = {}
    for part in word.split(","):
        name, _, value = part.partition("=")
        fields[_SAME.get(name, name)] = value
    kind = fields.setdefault("type", "volume")
    if kind not in ("bind", "tmpfs"):
        raise CommandError(f"--mount: type={kind} in {word!r}: there are bind and tmpfs, and no named volumes")
    for name in fields.keys() - (_BIND if kind == "bind" else _TMPFS):
        raise CommandError(f"--mount: unknown {name!r} in {word!r} for type={kind}")
    _absolute("--mount", word, fields.get("target", ""))
    return fields


def _is_set(word: str, fields: dict[str, str]) -> bool:
    value = fields.get("readonly", "false")
    if value not in ("", "true", "1", "false", "0"):
        raise CommandError(f"--mount: readonly={value} in {word!r} is neither true nor false")
    return value in ("", "true", "1")


def _absolute(option: str, word: str, path: str) -> None:
    if not path.startswith("/"):
        raise CommandError(f"{option}: {word!r} has no absolute path to mount at")


def _split(words: list[str]) -> list[str]:
    return [name for word in words for name in word.split(",") if name]
