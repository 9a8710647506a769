"""The JSON edge and the failure that crosses the pipe: what is refused, and with which words."""

from __future__ import annotations

import errno
import json

import pytest

from runtime.errors import RuntimeFailure
from runtime.fields import FieldError, Fields, decode, encode
from runtime.linux.libc import KernelError


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a":1,"a":2}', "duplicate key 'a'"),
        (b'{"a":NaN}', "NaN is no JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"", "not valid JSON at character 0"),
        (b"{} x", "something follows at character 2"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_p7_hostile_json_is_one_clear_sentence(raw, words):
    with pytest.raises(FieldError, match=words) as caught:
        decode(raw, "config.json")
    assert str(caught.value).startswith("config.json: ")
    assert caught.value.code == "invalid_argument"


def test_p8_bytes_that_are_no_utf8_survive():
    value = decode(b' {"env": ["A=\\u00e9\xff"]}\n')
    assert value == {"env": ["A=\u00e9\udcff"]}
    assert Fields(value).strs("env")[0].encode("utf-8", "surrogateescape") == "A=\u00e9".encode() + b"\xff"
    with pytest.raises(FieldError, match="half of a surrogate pair"):
        Fields(decode(b'{"a": "\\ud800"}')).str("a")


def test_encode_is_read_back_by_any_json_reader():
    value = {"a": [1, -2.5, True, None, 'x"\n\u20ac'], "b": {}, "c": [], "d": {"e": "f"}}
    assert json.loads(encode(value)) == value == decode(encode(value))
    with pytest.raises(TypeError):
        encode({"a": object()})


def test_size_is_bounded():
    with pytest.raises(FieldError, match="11 bytes, at most 10"):
        decode(b'"123456789"', "x", limit=10)


@pytest.mark.parametrize(
    ("value", "call", "sentence"),
    [
        ("1G", lambda f: f.int("limit"), 'memory.limit: expected integer, got "1G"'),
        (True, lambda f: f.int("limit"), "memory.limit: expected integer, got true"),
        (1.0, lambda f: f.int("limit"), "memory.limit: expected integer, got 1.0"),
        (70000, lambda f: f.int("limit", 0, 65535), "memory.limit: expected integer from 0 to 65535, got 70000"),
        (10**400, lambda f: f.int("limit"), "expected integer from .* got a number of too many digits"),
        (1, lambda f: f.bool("limit"), "memory.limit: expected boolean, got 1"),
        (5, lambda f: f.str("limit"), "memory.limit: expected string, got 5"),
        ("a\0b", lambda f: f.str("limit"), "memory.limit: holds a NUL byte"),
        ("c", lambda f: f.str("limit", choices=("a", "b")), 'memory.limit: expected one of a, b, got "c"'),
        (["a", 1], lambda f: f.strs("limit"), r"memory.limit\[1\]: expected string, got 1"),
        ([1, -1], lambda f: f.ints("limit", 0), r"memory.limit\[1\]: expected integer from 0"),
        ([{}, []], lambda f: f.objects("limit"), r"memory.limit\[1\]: expected object, got an array"),
        ({"k": 1}, lambda f: f.mapping("limit"), "memory.limit.k: expected string, got 1"),
        ("", lambda f: f.str("limit", required=True), "memory.limit: is required"),
        (True, lambda f: f.refuse("limit"), "memory.limit: is not supported"),
    ],
)
def test_a_bad_field_is_named_by_its_path(value, call, sentence):
    with pytest.raises(FieldError, match=sentence):
        call(Fields({"limit": value}, "memory"))


def test_null_reads_as_absent():
    fields = Fields({"a": None})
    assert fields.str("a", "x") == "x"
    assert fields.optional_int("a") is None
    assert fields.object("a") is None
    assert fields.strs("a") == ()
    assert not fields.has("a")
    fields.refuse("a")


def test_failure_survives_the_pipe():
    before = RuntimeFailure("mount proc on /proc", step="mounts", errno=errno.EPERM, hint="h", code="unavailable")
    after = RuntimeFailure.from_json(json.loads(json.dumps(before.to_json())))
    assert after.to_json() == before.to_json()
    assert str(after) == "mount proc on /proc"


def test_any_error_becomes_a_sentence_with_its_errno():
    failure = RuntimeFailure.of(KernelError(errno.EBUSY, "pivot_root", "/x"), step="pivot")
    assert (str(failure), failure.errno, failure.step) == (
        "pivot_root /x: EBUSY device or resource busy",
        errno.EBUSY,
        "pivot",
    )
    failure = RuntimeFailure.of(FileNotFoundError(errno.ENOENT, "x", "/no"), what="open it")
    assert str(failure) == "open it: /no: ENOENT no such file or directory"
    assert "no readable failure" in str(RuntimeFailure.from_json([1]))
