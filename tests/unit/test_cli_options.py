"""cri.cli: what the words of a command line become, and how wrong ones are refused."""

from __future__ import annotations

import importlib

import pytest

from cri.api import api_pb2 as pb
from cri.cli import main, options, output
from cri.cli.main import COMMANDS, CommandError


@pytest.mark.parametrize(
    ("text", "count"),
    [("512k", 512 << 10), ("256m", 256 << 20), ("1g", 1 << 30), ("1.5G", 3 << 29), ("4096", 4096), ("64MB", 64 << 20)],
)
def test_sizes(text: str, count: int) -> None:
    assert options.size("-m", text) == count


@pytest.mark.parametrize("text", ["", "m", "1x", "-1", "0", "1e", "1kk", "nan", "inf"])
def test_bad_sizes_name_the_option(text: str) -> None:
    with pytest.raises(CommandError, match="-m"):
        options.size("-m", text)


def test_volumes() -> None:
    mount = options.volume("/a:/b:ro,rslave")
    assert (mount.host_path, mount.container_path, mount.readonly) == ("/a", "/b", True)
    assert mount.propagation == pb.PROPAGATION_HOST_TO_CONTAINER
    for bad in ("/a", "/a:b", ":/b", "/a:/b:nope", "/a:/b:ro:x"):
        with pytest.raises(CommandError, match="-v"):
            options.volume(bad)


def test_ports() -> None:
    assert options.port("127.0.0.1:8080:80/udp") == pb.PortMapping(
        host_ip="127.0.0.1", host_port=8080, container_port=80, protocol=pb.UDP
    )
    assert options.port("8080:80") == pb.PortMapping(host_port=8080, container_port=80)
    for bad in ("80", "x:80", "0:80", "80:65536", "80:80/icmp", "not-an-ip:80:80"):
        with pytest.raises(CommandError, match="-p"):
            options.port(bad)


def test_users() -> None:
    context = pb.LinuxContainerSecurityContext()
    options.user(context, "1000:7")
    assert (context.run_as_user.value, context.run_as_group.value) == (1000, 7)
    context = pb.LinuxContainerSecurityContext()
    options.user(context, "web")
    assert context.run_as_username == "web" and not context.HasField("run_as_user")


def test_environment_takes_bare_names_from_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAVE", "1")
    monkeypatch.delenv("HAVE_NOT", raising=False)
    config = pb.ContainerConfig()
    options.environment(config, ["A=b=c", "HAVE", "HAVE_NOT", "EMPTY="])
    assert [(e.key, e.value) for e in config.envs] == [("A", b"b=c"), ("HAVE", b"1"), ("EMPTY", b"")]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_options_and_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"cri.cli.{command}")
    parser = main.parser_of(command)
    assert command in parser.format_help() and callable(module.run)
    assert main.parser_of(command) is parser  # also what a dump has made of it (cri/cli/resumed.py)


def test_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.ocid(["--root", "/x", "frobnicate"]) == 125
    assert "'frobnicate' is no command" in capsys.readouterr().err


def test_names_cannot_talk_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("NAME",), [("evil\x1b]0;x\x07",)])
    assert "\x1b" not in capsys.readouterr().out
