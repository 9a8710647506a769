"""The words of `ocid run` as CRI messages: sizes, volumes, ports, users.

Refuses what it cannot parse, naming the option. Pure: nothing is looked up but the working directory for relative
volume sources.
"""

from __future__ import annotations

import argparse
import ipaddress
import os

from cri.api import api_pb2 as pb
from cri.cli.main import CommandError

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_PROPAGATION = {
    "rprivate": pb.PROPAGATION_PRIVATE,
    "private": pb.PROPAGATION_PRIVATE,
    "rslave": pb.PROPAGATION_HOST_TO_CONTAINER,
    "slave": pb.PROPAGATION_HOST_TO_CONTAINER,
    "rshared": pb.PROPAGATION_BIDIRECTIONAL,
    "shared": pb.PROPAGATION_BIDIRECTIONAL,
}
CPU_PERIOD_US = 100_000


def size(option: str, text: str) -> int:
    """ "256m" as bytes: binary units, as docker reads them."""
    digits = text.rstrip("bBkKmMgGtT")
    unit = text[len(digits) :].lower()
    unit = unit[:1] if len(unit) == 2 and unit.endswith("b") else unit
    try:
        if unit not in _UNITS or not digits:
            raise ValueError
        count = int(float(digits) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise CommandError(f"{option}: {text!r} is no size such as 512k, 256m or 1g") from None
    if not 0 < count < 1 << 62:
        raise CommandError(f"{option}: {text!r} is out of range")
    return count


def volume(text: str) -> pb.Mount:
    """ "SRC:DST[:ro,rslave…]"."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0] or not parts[1].startswith("/"):
        raise CommandError(f"-v: {text!r} is not SRC:DST[:OPTIONS] with an absolute DST")
    mount = pb.Mount(host_path=os.path.join(os.getcwd(), parts[0]), container_path=parts[1])
    for word in parts[2].split(",") if len(parts) == 3 else ():
        if word in ("ro", "rw"):
            mount.readonly = word == "ro"
        elif word == "rro":
            mount.readonly = mount.recursive_read_only = True
        else:
            mount.propagation = propagation("-v", text, word)
    return mount


def propagation(option: str, text: str, word: str) -> pb.MountPropagation:
    """By docker's and mount(8)'s names."""
    if word not in _PROPAGATION:
        raise CommandError(f"{option}: unknown option {word!r} in {text!r}")
    return _PROPAGATION[word]


def port(text: str) -> pb.PortMapping:
    """ "[IP:]HOST:CONTAINER[/tcp|udp|sctp]"."""
    rest, _, protocol = text.partition("/")
    left, _, inside = rest.rpartition(":")
    ip, _, outside = left.rpartition(":")
    kinds = {"": pb.TCP, "tcp": pb.TCP, "udp": pb.UDP, "sctp": pb.SCTP}
    try:
        if protocol not in kinds or not (0 < int(inside) < 65536 and 0 < int(outside) < 65536):
            raise ValueError
        if ip:
            ipaddress.ip_address(ip.strip("[]"))
    except ValueError:
        raise CommandError(f"-p: {text!r} is not [IP:]HOSTPORT:PORT[/tcp|udp|sctp]") from None
    return pb.PortMapping(
        host_ip=ip.strip("[]"), host_port=int(outside), container_port=int(inside), protocol=kinds[protocol]
    )


def user(context: pb.LinuxContainerSecurityContext, text: str) -> None:
    """Sets who to run as from "USER[:GID]"."""
    name, colon, group = text.partition(":")
    if name.isascii() and name.isdecimal():
        context.run_as_user.value = int(name)
    else:
        context.run_as_username = name
    if colon:
        if not (group.isascii() and group.isdecimal()):
            raise CommandError(f"-u: the group in {text!r} must be a number")
        context.run_as_group.value = int(group)


def environment(config: pb.ContainerConfig, entries: list[str]) -> None:
    """Sets K=V; "K" alone takes the caller's value, and nothing where there is none."""
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not key:
            raise CommandError(f"-e: {entry!r} is not K=V")
        if equals or key in os.environ:
            config.envs.add(key=key, value=os.fsencode(value if equals else os.environ[key]))


def env_file(path: str) -> list[str]:
    """Its lines, K=V or K; empty ones and those that begin with # say nothing."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.strip() if "=" not in line else line.lstrip().rstrip("\r\n") for line in file]
    except OSError as error:
        raise CommandError(f"--env-file: {path}: {(error.strerror or str(error)).lower()}") from None
    return [line for line in lines if line and not line.startswith("#")]


def resources(args: argparse.Namespace) -> pb.LinuxContainerResources:
    """-m and --cpus."""
    limits = pb.LinuxContainerResources()
    if args.memory:
        limits.memory_limit_in_bytes = limits.memory_swap_limit_in_bytes = size("-m", args.memory)
    if args.cpus is not None:
        if not 0.01 <= args.cpus <= 4096:
            raise CommandError(f"--cpus: {args.cpus} is not from 0.01 to 4096")
        limits.cpu_period, limits.cpu_quota = CPU_PERIOD_US, int(args.cpus * CPU_PERIOD_US)
    return limits
