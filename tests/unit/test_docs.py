"""What the documents name is there: files, tests, modules, lanes; and the suite is as large as they say."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.harness.cases import load

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Directories of the tree that a document's path may begin in; tests are named below tests/ in the table of fields.
TOPS = "conformance|cri|docs|hack|imagestore|runtime|snapshotter|tests|unit|integration|vm|contract"
PATH = re.compile(rf"`((?:{TOPS})/[A-Za-z0-9_./-]*[A-Za-z0-9_])(?:::(\w+))?(?: [^`]*)?`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
MODULE = re.compile(r"python -m ((?:conformance|tests|runtime|cri)[a-z_.]*)")
LANE = re.compile(r"conformance/run ([a-z]+)")


def _named(text: str) -> Iterator[tuple[Path, str]]:
    """The files that a text names, and in them the tests."""
    for found in PATH.finditer(text):
        if any(word.isupper() for word in found[1].split("/")):
            continue  # what a running node has, with words such as CID for what differs
        place = ROOT if (ROOT / found[1].partition("/")[0]).is_dir() else ROOT / "tests"
        path = place / found[1]
        # A module is named as its file or, as documents of a part do, without its suffix.
        yield (path if path.exists() else path.with_name(f"{path.name}.py")), found[2] or ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = []
    for path, test in _named(text):
        if not path.exists() or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
            missing.append(f"{path.relative_to(ROOT)} {test}")
    missing += [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    missing += [name for name in MODULE.findall(text) if importlib.util.find_spec(name.rstrip(".")) is None]
    lanes = (ROOT / "conformance/run").read_text() + (ROOT / "conformance/run.py").read_text()
    missing += [f"conformance/run {name}" for name in LANE.findall(text) if not re.search(rf"\b{name}\b", lanes)]
    assert not missing, f"{document.relative_to(ROOT)} names what is not there"


def test_the_suite_is_as_large_as_its_results_say() -> None:
    text = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    cases = len(load())
    rows = re.findall(r"^\| (?:Debian's runc|ocirun) [\d.]+ \| (\d+) \| (\d+) \| (\d+) \|", text, re.M)
    assert len(rows) == 2
    assert {sum(map(int, row)) for row in rows} == {cases} == {int(re.findall(r"(\d+)\s+cases, in November", text)[0])}
