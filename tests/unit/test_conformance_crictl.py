"""The transcript of crictl: what differs from run to run is made the same, and docs/crictl.md has every subcommand."""

from __future__ import annotations

import re
from pathlib import Path

from conformance.crictl.stable import Stable

DOCUMENT = Path(__file__).parents[2] / "docs/crictl.md"
ONE, OTHER = "ab" * 32, "cd" * 32


def test_ids_are_the_same_wherever_they_are_seen() -> None:
    texts = []
    for first, second in ((ONE, OTHER), (OTHER, ONE)):
        stable = Stable({})
        texts.append(
            [stable.text(f"{first} {second}"), stable.text(f"{second[:13]} of {first[:12]}"), stable.text(first)]
        )
        assert stable.text(texts[-1][0]) == texts[-1][0], "what is the same already stays so"
    assert texts[0] == texts[1] and ONE not in texts[0][0]


def test_times_ports_and_places_are_fixed() -> None:
    stable = Stable({"/tmp/x-abc": "/demo", "x-abc": "demo"})
    raw = (
        '"pid": 77, at 2027-11-26T19:39:30.407732Z (1764187170000000123)\n/tmp/x-abc/root /x-abc 127.0.0.1:40999\n'
        'E1126 19:39:30.407732     466 remote.go:10] "failed"\n10.88.0.2 a2:00:11:22:33:44 oc3b5ce86c51 3 seconds ago'
    )
    assert stable.text(raw) == (
        '"pid": 4711, at 2026-01-01T12:00:00.000000001Z (1767268800000000001)\n/demo/root /demo 127.0.0.1:50001\n'
        "10.88.0.2 02:00:00:00:00:01 oc0000000001 a moment ago"
    )
    assert stable.text("127.0.0.1:40999 127.0.0.1:41000") == "127.0.0.1:50001 127.0.0.1:50002"


def test_figures_go_only_where_they_are_of_use() -> None:
    stable = Stable({})
    assert stable.text("a1  12.5MB  0.03  3") == "a1  12.5MB  0.03  3"
    assert stable.text("a1  12.5MB  0.03  3", figures=True) == "a1  #  #  #"


def test_tables_are_as_wide_as_they_need_to_be() -> None:
    narrow = "POD ID    CREATED         STATE\nabc       2 seconds ago   Ready"
    wide = "POD ID    CREATED                  STATE\nabc       Less than a second ago   Ready"
    found = Stable({}).text(narrow)
    assert found == Stable({}).text(wide) == "POD ID  CREATED       STATE\nabc     a moment ago  Ready"


def test_the_document_has_every_subcommand_and_nothing_of_the_machine_that_made_it() -> None:
    text = DOCUMENT.read_text()
    tried = set(re.findall(r"^\$ (?:printf .* \| )?crictl ([a-z-]+)", text, re.MULTILINE))
    listed = """attach checkpoint completion config create events exec imagefsinfo images info inspect inspecti inspectp
        logs metricdescs metricsp pods port-forward ps pull rm rmi rmp run runp runtime-config start stats statsp
        stop stopp update update-runtime-config version"""
    assert tried == set(listed.split())
    assert not re.search(r"/tmp/|/work/|/root/|/home/", text)
