"""The lane that takes fields out: what it takes out, which rows it plays, and what it says of what came of them."""

from __future__ import annotations

from argparse import Namespace

import pytest

from conformance.fields import UNIT, Told, chosen, problem
from cri.api import api_pb2 as pb
from tests.without import Taken

ANY = Namespace(row=[], changed=None, only=None)


def test_a_field_is_taken_out_wherever_its_message_is() -> None:
    taken = Taken()
    whole = pb.CreateContainerRequest(pod_sandbox_id="p")
    for path in ("/a", "/b"):
        whole.config.mounts.add(container_path=path, host_path="/h")
    taken.side, taken.message, taken.field = "request", "Mount", "container_path"
    left = taken.out_of("request", whole)
    assert [(mount.container_path, mount.host_path) for mount in left.config.mounts] == [("", "/h")] * 2
    assert taken.met == 2 and left.pod_sandbox_id == "p"
    assert taken.out_of("answer", whole) is whole and whole.config.mounts[0].container_path == "/a"


def test_rows_are_chosen_by_name_message_and_kind() -> None:
    def fields(**asked: object) -> list[str]:
        return [play.field for play in chosen(Namespace(**(vars(ANY) | asked)))]

    assert fields(row=["Mount.image"]) == ["request Mount.image"]
    assert fields(row=["PodSandboxMetadata.uid"]) == ["request PodSandboxMetadata.uid", "answer PodSandboxMetadata.uid"]
    assert fields(row=["KeyValue"]) == ["request KeyValue.key", "request KeyValue.value"]
    assert sorted(fields(only="unit") + fields(only="kernel")) == sorted(fields())
    assert all(play.test.startswith(UNIT) for play in chosen(Namespace(**(vars(ANY) | {"only": "unit"}))))
    with pytest.raises(SystemExit, match=r"no row with a test is named Mount\.nosuch"):
        fields(row=["Mount.nosuch"])


@pytest.mark.parametrize(
    ("whole", "without", "says"),
    [
        (Told(["passed", "passed"]), Told(["failed"], met=1), ""),
        (Told(["passed", "passed"]), Told(["passed", "failed"], met=1), ""),  # one case of several is enough
        (Told(["passed", "passed"]), Told(["passed"], met=1), "passes without it"),
        (Told(["passed", "passed"]), Told(["skipped"], met=1), "passes without it: skipped"),
        (Told(["passed", "passed"]), Told(["failed"]), "no message of the test has the field"),
        (Told(["passed", "failed"]), Told(["failed"], met=1), "no verdict"),
        (Told(["skipped"]), Told(["failed"], met=1), "no verdict"),
        (Told(), Told(["failed"], met=1), "no verdict"),
    ],
)
def test_only_a_test_that_fails_without_its_field_shows_it(whole: Told, without: Told, says: str) -> None:
    assert says in problem(whole, without) and bool(problem(whole, without)) == bool(says)
