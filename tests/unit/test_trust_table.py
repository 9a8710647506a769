"""docs/trust.md's table: every kind of requirement, met by what it should be met by and by nothing else.

Each cell is a test with signatures that openssl and gpg made (tests/trust_table.py); the last test compares the table
in the documentation with the cells that are here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagestore.policy import Material, parse_policy
from imagestore.reference import parse
from imagestore.scopes import in_registry
from imagestore.signatures import Signature
from imagestore.verdict import Verdict, judge
from tests.trust_table import ACCEPTED, COLUMNS, NOTHING, ROWS, Wanted, case, cell, timestamp_authorities
from tests.vectors import Maker

ROOT = Path(__file__).parents[2]
WANTED = Wanted()


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    found = Maker(tmp_path_factory.mktemp("vectors"))
    yield found
    found.close()


def judged(requirement: dict[str, object], signature: Signature, now: float, stampers: Path | None = None) -> Verdict:
    policy = parse_policy(json.dumps({"default": [requirement]}).encode(), "test")
    timestamps = Material("stampers", stampers) if stampers else None
    return judge(policy, in_registry(parse(WANTED.name)), (WANTED.digest,), [signature], now, timestamps=timestamps)


REASONS = {
    "wrong key": ("no good", "unable to get", "by a log that", "not good at"),
    "wrong identity": ("the policy wants", "is not for the host", "does not accept"),
    "altered payload": ("no good", "about another payload"),
    "another image": ("for another image",),
    "replay from another repository": ("does not accept",),
    "expired": ("expired",),
    "missing proof": ("no log entry", "neither a signed timestamp nor a proof"),
}


CELLS = [(row, column) for row in ROWS for column in COLUMNS if cell(row, column) != NOTHING]


def plain(row: str, column: str) -> str:
    """A cell's name as it can be typed: "sigstoreSigned-keyPaths.wrong-key"."""
    return ".".join(re.sub("[^A-Za-z0-9]+", "-", text.replace("…", "sigstoreSigned")) for text in (row, column))


@pytest.mark.parametrize(("row", "column"), CELLS, ids=[plain(*found) for found in CELLS])
def test_cell(maker: Maker, row: str, column: str) -> None:
    requirement, signature = case(maker, row, column, WANTED)
    verdict = judged(requirement, signature, maker.now + 60, timestamp_authorities(maker))
    said = verdict.outcomes[0].sentence()
    assert verdict.accepted is (cell(row, column) == ACCEPTED), said
    if column != "good":
        assert any(reason in said for reason in REASONS[column]), said


def test_a_key_that_has_expired_was_one(maker: Maker) -> None:
    """Or the cell above would show nothing."""
    requirement, signature = case(maker, "signedBy keyPath", "expired", WANTED)
    assert judged(requirement, signature, 1577926800).accepted
    requirement, signature = case(maker, "… pki caRootsPath, subjectEmail", "expired", WANTED)
    assert "certificate has expired" in judged(requirement, signature, maker.now).outcomes[0].sentence()


def table() -> str:
    head = ["requirement", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join([row, *(cell(row, column) for column in COLUMNS)]) + " |" for row in ROWS]
    return "\n".join(lines)


def test_the_documentation_has_this_table() -> None:
    text = (ROOT / "docs/trust.md").read_text()
    inside = text.partition("<!-- table -->\n")[2].partition("\n<!-- end of table -->")[0]
    assert inside == table(), f"docs/trust.md should have:\n{table()}"
