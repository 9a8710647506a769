"""cri.cli.template: what of Go's templates there is, printed as Go prints it (seen with skopeo 1.9.3), and how all else
is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cri.cli.main import CommandError
from cri.cli.template import Time, render

DOCUMENT: dict[str, Any] = {
    "Os": "linux",
    "Digest": "sha256:ab",
    "Created": Time("2020-01-02T03:04:05.5Z"),
    "Labels": {"b": "2", "a": "1 <x>"},
    "Env": ["A=1", "B=2"],
    "Empty": "",
    "None": None,
    "Deep": {"state": {"pid": 7, "ok": True}},
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ("{{.Digest}}", "sha256:ab"),
        ("{{ .Os }}/{{.Digest}}", "linux/sha256:ab"),
        ("{{.Created}}", "2020-01-02 03:04:05.5 +0000 UTC"),
        ("{{json .Created}}", '"2020-01-02T03:04:05.5Z"'),
        ("{{.Labels}} {{.Env}}", "map[a:1 <x> b:2] [A=1 B=2]"),
        ("{{json .Env}} {{json .Labels.b}} {{json .None}}", '["A=1","B=2"] "2" null'),
        ("{{.Labels.b}} {{.Labels.nope}} {{.None}}", "2 <no value> <nil>"),
        ('{{index .Labels "b"}} {{index .Env 1}} {{(index .Env 0)}}', "2 B=2 A=1"),
        ("{{.Deep.state.pid}} {{.Deep.state.ok}} {{with .Deep}}{{.state.pid}}{{end}}", "7 true 7"),
        ("{{range .Env}}{{.}} {{end}}", "A=1 B=2 "),
        ("{{range $i, $x := .Env}}{{$i}}={{$x}};{{end}}", "0=A=1;1=B=2;"),
        ("{{range $k, $v := .Labels}}{{$k}}{{end}}", "ab"),
        ("{{range .None}}x{{else}}none{{end}}", "none"),
        ('{{range .Env}}{{$.Os}}{{end}}{{(index .Deep "state").pid}}', "linuxlinux7"),
        ("{{if .Empty}}a{{else if .Env}}b{{else}}c{{end}}", "b"),
        ('{{if and (eq .Os "linux") (ne .Os "x")}}ok{{end}}', "ok"),
        ("{{with $x := .Os}}<{{$x}}>{{end}}{{with .Empty}}x{{end}}", "<linux>"),
        ('{{or .Empty "none"}} {{not .Os}} {{len .Env}}', "none false 2"),
        ('{{printf "%s-%d %q %%" .Os (len .Env) .Os}}', 'linux-2 "linux" %'),
        ('{{.Os | printf "%v" | upper}} {{join .Env ","}}', "LINUX A=1,B=2"),
        ('{{print 1 2 "x"}}', "1 2x"),
        ("x  {{- .Os -}}  x{{/* c */}}", "xlinuxx"),
        ("a\\tb\\n{{.Os}}", "a\tb\nlinux"),
        ('{{"a\\"b"}}{{`raw`}}', 'a"braw'),
    ],
)
def test_as_go_prints_it(template: str, expected: str) -> None:
    assert render(template, DOCUMENT) == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{.Nope}}", "there is no field Nope; there are Os, Digest"),
        ("{{range .Env}}{{$.Nope}}{{end}}", "there is no field Nope"),
        ("{{.Os.Foo}}", "'linux' has no field Foo"),
        ("{{", "does not end"),
        ("{{}}", "empty action"),
        ("{{end}}", "without a beginning"),
        ("{{else}}", "without a beginning"),
        ("{{if .Os}}", "without {{end}}"),
        ("{{range .Os}}{{end}}", "which is no list"),
        ("{{index .Env 7}}", "not so many"),
        ("{{index .Env}}{{len 3}}", "len does not take 1 of such values"),
        ("{{call .Os}}", "no function 'call'; there are and, eq"),
        ('{{template "x"}}', "no function 'template'"),
        ("{{$x}}", "no variable $x"),
        ("{{.Os .Env}}", "is no function"),
        ("{{(len .Env}}", "not closed"),
        ('{{printf "%x" 1}}', "%x is not known"),
        ("{{.Os | }}", "a value is missing"),
        ("{{&}}", "not understood"),
    ],
)
def test_what_is_not_there_is_told(template: str, says: str) -> None:
    with pytest.raises(CommandError, match="^--format: ") as failed:
        render(template, DOCUMENT)
    assert says in str(failed.value)
