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
    taken.how, taken.message, taken.field = "request", "Mount", "container_path"
    left = taken.out_of("request", whole)
    assert [(mount.container_path, mount.host_path) for mount in left.config.mounts] == [("", "/h")] * 2
    assert taken.met == 2 and left.pod_sandbox_id == "p"
    assert taken.out_of("answer", whole) is whole and whole.config.mounts[0].container_path == "/a"


def test_a_field_is_filled_with_something_else_wherever_it_is_set() -> None:
    taken = Taken()
    taken.how = "altered"
    answer = pb.ContainerStatusResponse(info={"info": "{}"})
    status = answer.status
    status.id, status.created_at, status.state, status.exit_code = "c", 7, pb.CONTAINER_EXITED, 3
    status.mounts.add(container_path="/a", readonly=True)
    status.user.linux.supplemental_groups.append(5)
    groups = "supplemental_groups"
    asked = [
        ("ContainerStatus", "id", lambda told: told.status.id == "c"),
        ("ContainerStatus", "created_at", lambda told: told.status.created_at < 1_000_000_000),
        ("ContainerStatus", "state", lambda told: told.status.state == pb.CONTAINER_EXITED),
        ("ContainerStatus", "exit_code", lambda told: told.status.exit_code == 3),
        ("ContainerStatus", "mounts", lambda told: len(told.status.mounts) == 1),
        ("Mount", "readonly", lambda told: told.status.mounts[0].readonly),
        ("LinuxContainerUser", groups, lambda told: len(told.status.user.linux.supplemental_groups) == 1),
        ("ContainerStatusResponse", "info", lambda told: dict(told.info) == {"info": "{}"}),
    ]  # fmt: skip
    for message, field, is_right in asked:
        taken.message, taken.field, taken.met = message, field, 0
        assert is_right(answer) and not is_right(taken.out_of("answer", answer)), field
        assert taken.met == 1 and taken.out_of("request", answer) is answer
    taken.message, taken.field, taken.met = "ContainerStatus", "reason", 0
    assert taken.out_of("answer", answer) == answer and not taken.met, "what is not there is not altered"


def test_rows_are_chosen_by_name_message_and_kind() -> None:
    def fields(**asked: object) -> list[str]:
        return [play.field for play in chosen(Namespace(**(vars(ANY) | asked)))]

    assert fields(row=["Mount.image"]) == ["request Mount.image", "answer Mount.image"]
    names = [f"{how} PodSandboxMetadata.uid" for how in ("request", "answer", "altered")]
    assert fields(row=["PodSandboxMetadata.uid"]) == names
    assert fields(row=["PodSandboxStatusResponse.status"]) == ["answer PodSandboxStatusResponse.status"]
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
        (Told(["passed", "passed"]), Told(["passed"], met=1), "does not notice"),
        (Told(["passed", "passed"]), Told(["skipped"], met=1), "does not notice: skipped"),
        (Told(["passed", "passed"]), Told(["failed"]), "no message of the test has the field"),
        (Told(["passed", "failed"]), Told(["failed"], met=1), "no verdict"),
        (Told(["skipped"]), Told(["failed"], met=1), "no verdict"),
        (Told(), Told(["failed"], met=1), "no verdict"),
    ],
)
def test_only_a_test_that_fails_without_its_field_shows_it(whole: Told, without: Told, says: str) -> None:
    assert says in problem(whole, without) and bool(problem(whole, without)) == bool(says)
