"""conformance/cri_fields.toml and cri_answers.toml as values and as docs/cri-fields.md: each field of each request, and
of each answer.

    python -m conformance.cri_fields      writes docs/cri-fields.md anew

Refuses to guess: what is not in the file is in no table. Invariant: the document is what this prints, and a test
compares them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "conformance/cri_fields.toml"
ANSWERS = ROOT / "conformance/cri_answers.toml"
DOCUMENT = ROOT / "docs/cri-fields.md"
KINDS = ("honoured", "refused", "moot")
PEERS = {"both": ("yes", "yes"), "containerd": ("yes", "no"), "cri-o": ("no", "yes"), "neither": ("no", "no")}

HEAD = """\
# Every field of the CRI

Printed by `python -m conformance.cri_fields` from `conformance/cri_fields.toml` and, of answers, from
`conformance/cri_answers.toml`; `tests/unit/test_cri_fields_table.py` fails when the proto has a field that is not
there. *honoured*: it has the effect that the CRI says. *refused*: a request that has it fails with INVALID_ARGUMENT
(UNIMPLEMENTED where the whole call does) and names the field. *moot*: there is nothing to be done with it here, for the
reason given. The peers' columns say whether the field is named in their sources for the CRI (containerd 2.3.4, CRI-O
1.36.3), which does not say what they do with it. What Windows alone has is left out; a request that has it is refused.
"""

ANSWERS_HEAD = """\
Each is shown by a test that fails when the field is taken out of all answers and, unless it is a message that has
fields of its own, when something else is in it: `conformance/run fields` does both.

The peers' columns say whether a field is filled: their sources for Linux were read with types (Go's own type checker,
over the files that know the CRI's package), and a field counts that is given a value, in a literal or by assignment, or
whose message is handed out as a request brought it (names, namespaces, mounts, images). A URL counts that their
streaming library makes. That does not say whether the value is right, nor in which of the calls, on which version of
cgroups or with which configuration it is there: CRI-O has a pod's `containers_statuses` and `timestamp` only with pod
events on. What their version of the CRI (0.36.3) does not have, they do not fill.
"""


@dataclass(frozen=True, slots=True)
class Field:
    """One row."""

    what: str
    where: str
    test: str
    peers: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of the answers' fields."""

    test: str
    peers: str


@dataclass(frozen=True, slots=True)
class Call:
    """One row of the calls."""

    what: str
    test: str
    peers: str


def _tables(path: Path) -> dict[str, dict[str, list[str]]]:
    with path.open("rb") as file:
        return tomllib.load(file)


def load(path: Path = SOURCE) -> Mapping[str, Mapping[str, Field]]:
    """The fields by message and name."""
    return {
        message: {name: Field(*row) for name, row in fields.items()}
        for message, fields in _tables(path).items()
        if message != "calls"
    }


def load_calls(path: Path = SOURCE) -> Mapping[str, Call]:
    """The calls by their names."""
    return {name: Call(*row) for name, row in _tables(path)["calls"].items()}


def load_answers(path: Path = ANSWERS) -> Mapping[str, Mapping[str, Answer]]:
    """The fields of answers, by message and name."""
    return {message: {name: Answer(*row) for name, row in fields.items()} for message, fields in _tables(path).items()}


def _of_answers(answers: Mapping[str, Mapping[str, Answer]]) -> list[str]:
    lines = [f"\n## Fields of answers\n\n{sum(map(len, answers.values()))} fields.", ANSWERS_HEAD]
    lines += ["| field | containerd | CRI-O | shown by |", "|---|---|---|---|"]
    for message, fields in answers.items():
        for name, row in fields.items():
            lines.append(f"| `{message}.{name}` | {' | '.join(PEERS[row.peers])} | {_named(row.test)} |")
    return lines


def _named(test: str) -> str:
    return f"`{test.removeprefix('tests/')}`" if test else "—"


def rendered(
    table: Mapping[str, Mapping[str, Field]], calls: Mapping[str, Call], answers: Mapping[str, Mapping[str, Answer]]
) -> str:
    """The document."""
    lines = [HEAD, "## Calls\n", "| call | ocid | containerd | CRI-O | shown by |", "|---|---|---|---|---|"]
    for name, call in calls.items():
        said = "yes" if call.what == "honoured" else "UNIMPLEMENTED"
        lines.append(f"| {name} | {said} | {' | '.join(PEERS[call.peers])} | `{call.test.removeprefix('tests/')}` |")
    lines.append("\n## Fields\n")
    counts = {kind: sum(row.what == kind for fields in table.values() for row in fields.values()) for kind in KINDS}
    lines.append(", ".join(f"{number} {kind}" for kind, number in counts.items()) + ".\n")
    lines += ["| field | ocid | by | containerd | CRI-O | shown by |", "|---|---|---|---|---|---|"]
    for message, fields in table.items():
        for name, row in fields.items():
            what = f"{row.what}. {row.note}" if row.note else row.what
            where = f"`{row.where}`" if row.where else "—"
            peers = " | ".join(PEERS[row.peers])
            lines.append(f"| `{message}.{name}` | {what} | {where} | {peers} | {_named(row.test)} |")
    return "\n".join([*lines, *_of_answers(answers)]) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(load(), load_calls(), load_answers()), encoding="utf-8")
