"""hosts.toml directories: order, capabilities, defaults, and one sentence for a file that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagestore.host_files import with_certificates
from imagestore.hosts import Host, hosts_for, upstream_host
from imagestore.model import ImageError
from imagestore.proxy import proxy_for


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name / "hosts.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def bases(hosts: tuple[Host, ...]) -> list[str]:
    return [host.base for host in hosts]


@pytest.mark.parametrize(
    ("domain", "base"),
    [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("quay.io", "https://quay.io/v2"),
        ("registry.example:5000", "https://registry.example:5000/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.1", "http://127.0.0.1/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("localhost.example", "https://localhost.example/v2"),
        ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
    ],
)
def test_s28_without_files(tmp_path: Path, domain: str, base: str) -> None:
    assert hosts_for(domain, (tmp_path,), 16) == (Host(base, upstream=True, push=True),)


def test_order_capabilities_and_options(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "docker.io",
        """
        server = "https://docker.io"
        [host."https://z-mirror.example"]
          capabilities = ["pull"]
        [host."http://a-mirror.example:5000/prefix/"]
          capabilities = ["pull", "resolve"]
          skip_verify = true
        [host."third.example/whole/path"]
          override_path = true
          ca = "ca.pem"
          client = [["client.crt", "client.key"], ["both.pem", ""]]
          [host."third.example/whole/path".header]
            Authorization = "Bearer s3cret"
            x-two = ["a", "b"]
        """,
    )
    first, second, third, last = hosts_for("docker.io", (tmp_path,), 16)
    assert bases((first, second, third, last)) == [
        "https://z-mirror.example/v2",
        "http://a-mirror.example:5000/prefix/v2",
        "https://third.example/whole/path",
        "https://registry-1.docker.io/v2",
    ]
    assert (first.pull, first.resolve, first.upstream) == (True, False, False)
    assert (second.pull, second.resolve, second.skip_verify) == (True, True, True)
    assert third.ca == (path.parent / "ca.pem",)
    assert third.client == ((path.parent / "client.crt", path.parent / "client.key"), (path.parent / "both.pem", None))
    assert third.headers == (("Authorization", "Bearer s3cret"), ("x-two", "a"), ("x-two", "b"))
    assert last.upstream and not last.skip_verify
    assert "s3cret" not in repr(third)


def test_first_directory_wins_then_default(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ocid", tmp_path / "containerd"
    write(theirs, "quay.io", 'server = "https://theirs.example"')
    write(theirs, "_default", 'server = "https://default.example"')
    directories = (ours, theirs)
    assert bases(hosts_for("quay.io", directories, 16)) == ["https://theirs.example/v2"]
    write(ours, "quay.io", 'server = "https://ours.example"')
    assert bases(hosts_for("quay.io", directories, 16)) == ["https://ours.example/v2"]
    assert bases(hosts_for("ghcr.io", directories, 16)) == ["https://default.example/v2"]


def test_default_without_server_keeps_the_registry(tmp_path: Path) -> None:
    write(tmp_path, "_default", '[host."https://mirror.example"]')
    assert bases(hosts_for("ghcr.io", (tmp_path,), 16)) == ["https://mirror.example/v2", "https://ghcr.io/v2"]


@pytest.mark.parametrize("name", ["registry.example_5000_", "registry.example:5000"])
def test_port_spellings(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, 'server = "http://plain.example"')
    assert bases(hosts_for("registry.example:5000", (tmp_path,), 16)) == ["http://plain.example/v2"]


def test_server_options_are_at_the_top(tmp_path: Path) -> None:
    write(tmp_path, "quay.io", 'server = "https://quay.io"\nskip_verify = true\n[header]\nx-a = "b"')
    (host,) = hosts_for("quay.io", (tmp_path,), 16)
    assert host.upstream and host.skip_verify and host.headers == (("x-a", "b"),)


def test_unknown_fields_belong_to_other_readers(tmp_path: Path) -> None:
    write(
        tmp_path,
        "quay.io",
        '[host."https://m.example"]\ndial_timeout = "1s"\n[host."https://m.example".rewrite]\na="b"',
    )
    assert len(hosts_for("quay.io", (tmp_path,), 16)) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("server = ", "not valid TOML"),
        ("server = 7", "server: expected a URL"),
        ('server = "ftp://x.example"', "server: expected http://"),
        ('server = "https://user:pw@x.example"', "without user and password"),
        ('server = "https://x.example/?q=1"', "server: expected http://"),
        ('server = "https://x_y:1"', "expected a host"),
        ('host = "x"', "host: expected a table"),
        ('[host]\n"https://x.example" = 7', "expected a table"),
        ('[host."https://x.example"]\ncapabilities = ["fly"]', "capabilities: expected some of"),
        ('[host."https://x.example"]\ncapabilities = 7', "capabilities: expected a string or a list"),
        ('[host."https://x.example"]\nskip_verify = "yes"', "skip_verify: expected true or false"),
        ('[host."https://x.example"]\nca = [7]', "ca: expected a string or a list"),
        ('[host."https://x.example"]\nclient = [["a", "b", "c"]]', "client: expected a file"),
        ('[host."https://x.example"]\nclient = 7', "client: expected a file"),
        ('[host."https://x.example"]\nheader = 7', "header: expected a table"),
        ('[host."https://x.example".header]\n"a b" = "c"', "header: expected names"),
        ('[host."https://x.example".header]\na = "c\\nd"', "expected one line"),
        ("\n".join(f'[host."https://h{n}.example"]' for n in range(17)), "17 hosts, the limit is 16"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, "quay.io", text)
    with pytest.raises(ImageError, match=says) as raised:
        hosts_for("quay.io", (tmp_path,), 16)
    assert str(path) in str(raised.value) and "pw" not in str(raised.value)


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    import os

    (tmp_path / "quay.io").mkdir()
    os.mkfifo(tmp_path / "quay.io/hosts.toml")
    with pytest.raises(ImageError, match=r"regular file.*hosts\.toml"):
        hosts_for("quay.io", (tmp_path,), 16)


PROXIES = {"HTTPS_PROXY": "http://secure:3128", "http_proxy": "plain:80"}


@pytest.mark.parametrize(
    ("url", "excluded", "proxy"),
    [
        ("https://quay.io/v2/", "", "http://secure:3128"),
        ("http://quay.io/v2/", "", "http://plain:80"),
        ("http://localhost:5000/", "", None),
        ("https://127.0.0.1/", "", None),
        ("https://[::1]:5000/", "", None),
        ("https://quay.io/", "*", None),
        ("https://quay.io/", "other, QUAY.io", None),
        ("https://cdn.quay.io/", ".quay.io", None),
        ("https://cdn.quay.io/", "quay.io", None),
        ("https://notquay.io/", "quay.io", "http://secure:3128"),
        ("https://10.1.2.3:5000/", "10.0.0.0/8", None),
        ("https://11.1.2.3:5000/", "10.0.0.0/8", "http://secure:3128"),
        ("https://[2001:db8::5]/", "2001:db8::/32", None),
        ("https://quay.io:5000/", "quay.io:5000", None),
        ("https://quay.io/", "quay.io:5000", "http://secure:3128"),
    ],
)
def test_proxies_of_the_environment(url: str, excluded: str, proxy: str | None) -> None:
    assert proxy_for(url, {**PROXIES, "NO_PROXY": excluded}) == proxy
    assert proxy_for(url, {}) is None


# -------------------------------------------------------------------------------------- certificates as docker has them


def lay(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).touch()
    return directory


def test_certificates_lie_under_the_name_of_their_host(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    lay(ours / "r.example:5000")  # empty: the next one is looked at
    own = lay(theirs / "r.example:5000", "ca.crt", "b.crt", "client.cert", "client.key", "README")
    lay(theirs / "r.example", "other.crt")
    usual = lay(theirs / "_default", "all.crt")
    hub = lay(theirs / "docker.io", "hub.crt")

    def of(domain: str) -> Host:
        (host,) = with_certificates((upstream_host(domain),), domain, (ours, theirs))
        return host

    found = of("r.example:5000")
    assert found.ca == (own / "b.crt", own / "ca.crt")
    assert found.client == ((own / "client.cert", own / "client.key"),)
    assert of("quay.io").ca == (usual / "all.crt",) and of("quay.io").client == ()
    assert of("docker.io").ca == (usual / "all.crt",)  # under registry-1.docker.io's own name first
    (usual / "all.crt").unlink()
    assert of("docker.io").ca == (hub / "hub.crt",) and of("quay.io") == upstream_host("quay.io")


def test_a_mirror_has_its_own_certificates_only(tmp_path: Path) -> None:
    files = lay(tmp_path / "r.example", "ca.crt")
    hosts = (Host("https://m.example/v2", upstream=False), Host("https://r.example/v2", upstream=True))
    mirror, registry = with_certificates(hosts, "r.example", (tmp_path,))
    assert mirror == hosts[0] and registry.ca == (files / "ca.crt",)


def test_certificates_say_that_a_registry_speaks_tls(tmp_path: Path) -> None:
    lay(tmp_path / "localhost:5000", "ca.crt")
    (host,) = with_certificates((upstream_host("localhost:5000"),), "localhost:5000", (tmp_path,))
    assert host.base == "https://localhost:5000/v2"
    both = tuple(Host(f"{scheme}://localhost:5000/v2", upstream=True) for scheme in ("http", "https"))
    assert bases(with_certificates(both, "localhost:5000", (tmp_path,))) == bases(both)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a.cert",), r"a\.key is missing: the key of a client"),
        (("a.cert", "a.key", "b.key"), r"b\.cert is missing: the certificate of a client"),
    ],
)
def test_half_of_a_client_is_an_error(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    lay(tmp_path / "r.example", *names)
    with pytest.raises(ImageError, match=says):
        with_certificates((upstream_host("r.example"),), "r.example", (tmp_path,))
