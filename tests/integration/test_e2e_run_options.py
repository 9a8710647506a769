"""Options of `ocid run` in docker's words: tmpfs, --mount, DNS, capabilities and limits, seen from inside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import ocid, once
from tests.e2e import Node

pytestmark = pytest.mark.usefixtures("as_before")


def _mounted(text: str, path: str) -> tuple[str, set[str]]:
    """Type and options of what /proc/mounts has at `path`, of several the last."""
    fields = [line.split() for line in text.splitlines() if line.count(" ") >= 5]
    kind, options = [(one[2], set(one[3].split(","))) for one in fields if one[1] == path][-1]
    return kind, options


def test_filesystems_in_memory(cli: Node) -> None:
    words = ["--tmpfs", "/one", "--tmpfs", "/two:size=64k,mode=750,exec,uid=5"]
    words += ["--mount", "type=tmpfs,target=/three,tmpfs-size=1m,tmpfs-mode=700,ro"]
    script = "cat /proc/mounts; stat -c '%a %u' /one /two; "
    script += "dd if=/dev/zero of=/two/x bs=1k count=100 2>/dev/null || echo full"
    text = once(cli, *words, "IMAGE", "sh", "-c", script)
    kind, options = _mounted(text, "/one")
    assert kind == "tmpfs" and {"rw", "nosuid", "nodev", "noexec"} <= options
    kind, options = _mounted(text, "/two")
    assert kind == "tmpfs" and {"nosuid", "nodev", "size=64k"} <= options and "noexec" not in options
    kind, options = _mounted(text, "/three")
    assert kind == "tmpfs" and {"ro", "size=1024k", "mode=700"} <= options
    assert text.splitlines()[-3:] == ["1777 0", "750 5", "full"]


def test_mounts_by_words(cli: Node, tmp_path: Path) -> None:
    """A tmpfs below which something else is mounted comes first, wherever it is named."""
    (tmp_path / "file").write_text("of the host\n")
    words = [
        "--mount",
        f"type=bind,src={tmp_path},dst=/a,readonly",
        "--mount",
        f"type=bind,source={tmp_path},target=/t/b",
    ]
    script = "cat /a/file /t/b/file; echo more >>/t/b/file; touch /a/new 2>/dev/null || echo read-only"
    assert once(cli, *words, "--tmpfs", "/t", "IMAGE", "sh", "-c", script) == "of the host\nof the host\nread-only\n"
    assert (tmp_path / "file").read_text() == "of the host\nmore\n"


def test_name_servers(cli: Node) -> None:
    words = ["--dns", "192.0.2.1", "--dns", "2001:db8::1", "--dns-search", "a.example", "--dns-option", "ndots:2"]
    for network in ("none", "host"):
        text = once(cli, f"--net={network}", *words, "IMAGE", "cat", "/etc/resolv.conf")
        assert text == "search a.example\nnameserver 192.0.2.1\nnameserver 2001:db8::1\noptions ndots:2\n"


def _capabilities(cli: Node, *words: str) -> int:
    return int(once(cli, *words, "IMAGE", "grep", "CapEff", "/proc/self/status").split()[1], 16)


def test_capabilities(cli: Node) -> None:
    chown, net_admin = 1 << 0, 1 << 12  # linux/capability.h
    usual = _capabilities(cli)
    assert usual & chown and not usual & net_admin
    assert _capabilities(cli, "--cap-add", "net_admin") == usual | net_admin
    assert _capabilities(cli, "--cap-drop", "CAP_CHOWN") == usual & ~chown
    assert _capabilities(cli, "--cap-drop", "ALL", "--cap-add", "NET_ADMIN,CHOWN") == chown | net_admin


def test_limits(cli: Node) -> None:
    words = ["--ulimit", "nofile=100:200", "--ulimit", "core=0", "--ulimit", "stack=-1"]
    limits = once(cli, *words, "IMAGE", "cat", "/proc/self/limits")
    found = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert found["Max open files"] == ["100", "200"]
    assert found["Max core file size"] == ["0", "0"]
    assert found["Max stack size"] == ["unlimited", "unlimited"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tmpfs", "relative"], "absolute"),
        (["--tmpfs", "/"], "below the root"),
        (["--tmpfs", "/a/../b"], "without .."),
        (["--tmpfs", "/a:bind"], "unknown option 'bind'"),
        (["--mount", "src=a,dst=/b"], "no named volumes"),
        (["--mount", "type=bind,dst=/b"], "no source="),
        (["--mount", "type=bind,src=/nosuch,dst=/b"], "/nosuch is not there"),
        (["--mount", "type=bind,src=/,dst=/b,tmpfs-size=1"], "unknown 'tmpfs-size'"),
        (["--mount", "type=bind,src=/,dst=/b,ro=maybe"], "neither true nor false"),
        (["--mount", "type=bind,src=/,dst=/b,bind-propagation=up"], "unknown option 'up'"),
        (["--dns", "name"], "no IP address"),
        (["--cap-add", "FLY"], "no capability 'FLY'"),
        (["--ulimit", "nofile"], "NAME=SOFT"),
        (["--ulimit", "files=1"], "--ulimit: 'files=1' is not NAME=SOFT[:HARD], with one of as, core,"),
        (["--ulimit", "nofile=5:4"], "above its hard one"),
        (["--ulimit", "nofile=-5"], "no number"),
    ],
)
def test_wrong_words(cli: Node, words: list[str], said: str) -> None:
    done = ocid(cli, "run", "--rm", *words, cli.image, "true")
    assert (done.returncode, done.stderr.count("\n")) == (125, 1) and said in done.stderr, done.stderr
