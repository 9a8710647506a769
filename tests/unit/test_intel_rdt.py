"""linux.intelRdt over plain files that look like resctrl: classes, schemata, monitors, and who removes what."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime import intel_rdt, lifecycle
from runtime.errors import RuntimeFailure
from runtime.fields import Fields, encode
from runtime.intel_rdt import Group, IntelRdt
from runtime.state import describe_group

SCHEMATA = "    L3:0=7ff;1=7ff\n    MB:0=100;1=100\n"


@pytest.fixture
def resctrl(tmp_path: Path) -> Path:
    root = tmp_path / "resctrl"
    _group(root)
    return root


def _group(path: Path, schemata: str = SCHEMATA) -> Path:
    path.mkdir()
    (path / "schemata").write_text(schemata)
    (path / "tasks").write_text("")
    (path / "mon_groups").mkdir()
    return path


def read(**fields: object) -> IntelRdt:
    return intel_rdt.parse(Fields(fields, "linux.intelRdt"))


def test_everything_is_read() -> None:
    assert read() == IntelRdt()
    found = read(
        closID="gold", memBwSchema="MB:0=20", l3CacheSchema="L3:0=f", schemata=["L2:0=1"], enableMonitoring=True
    )
    assert found == IntelRdt("gold", ("L3:0=f", "MB:0=20", "L2:0=1"), True)
    assert read(closID="/") == IntelRdt("/") and read(enableCMT=True) == read(enableMBM=True) == IntelRdt(
        monitoring=True
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"closID": "../gold"}, "closID: '../gold' is no name"),
        ({"closID": "a/b"}, "closID"),
        ({"closID": ".."}, "closID"),
        ({"closID": "info"}, "closID"),
        ({"closID": "mon_groups"}, "closID"),
        ({"closID": "a\nb"}, "closID"),
        ({"closID": "x" * 256}, "closID"),
        ({"memBwSchema": "L3:0=f"}, "memBwSchema: expected a schema that starts with MB:"),
        ({"memBwSchema": "MB:0=1\nL3:0=f"}, "memBwSchema: must be one line"),
        ({"schemata": ["L3:0=f", "a\nb"]}, r"schemata\[1\]: must be one line"),
        ({"enableMonitoring": 1}, "enableMonitoring: expected boolean"),
    ],
)
def test_s19_what_is_wrong_is_named_by_path(fields: dict[str, object], words: str) -> None:
    with pytest.raises(RuntimeFailure, match=r"^linux\.intelRdt\." + words):
        read(**fields)


def test_a_class_of_somebody_else_is_joined_as_it_is_and_left_there(resctrl: Path) -> None:
    gold = _group(resctrl / "gold", "L3:0=7f0;1=01f\nMB:0=20;1=70\n")
    group = intel_rdt.join(read(closID="gold"), "c1", str(resctrl))
    assert group == Group(str(gold))
    intel_rdt.enter(group, 4711)
    assert (gold / "tasks").read_text() == "4711"
    asked = read(closID="gold", l3CacheSchema="L3:0=7F0;1=1f", memBwSchema="MB:1=70")
    assert intel_rdt.join(asked, "c1", str(resctrl)) == group
    with pytest.raises(
        RuntimeFailure, match="class of service gold exists, and its schemata MB:0=20;1=70 is not the MB:0=30"
    ):
        intel_rdt.join(read(closID="gold", memBwSchema="MB:0=30"), "c1", str(resctrl))
    assert (gold / "schemata").read_text() == "L3:0=7f0;1=01f\nMB:0=20;1=70\n"
    intel_rdt.leave(group)
    assert gold.is_dir()


def test_a_class_that_is_not_there_needs_a_schema(resctrl: Path) -> None:
    with pytest.raises(RuntimeFailure, match="linux.intelRdt.closID: there is no class of service gold"):
        intel_rdt.join(read(closID="gold"), "c1", str(resctrl))
    assert not (resctrl / "gold").exists()


def test_the_default_class(resctrl: Path) -> None:
    group = intel_rdt.join(read(closID="/", enableMonitoring=True), "c1", str(resctrl))
    assert group == Group(str(resctrl), f"{resctrl}/mon_groups/c1")
    intel_rdt.leave(group)
    assert not (resctrl / "mon_groups/c1").exists() and resctrl.is_dir()


def test_a_class_of_its_own_goes_with_the_container(resctrl: Path) -> None:
    group = intel_rdt.join(read(), "c1", str(resctrl))
    assert group == Group(f"{resctrl}/c1", own=True) and (resctrl / "c1").is_dir()
    intel_rdt.leave(group)
    intel_rdt.leave(group)
    assert not (resctrl / "c1").exists()


def test_o37_a_create_that_was_killed_is_cleaned_up_from_its_note(resctrl: Path, tmp_path: Path) -> None:
    root = tmp_path / "state"
    for name, group, there in (
        ("c1", Group(f"{resctrl}/c1", own=True), False),  # made, and then killed
        ("c2", Group(f"{resctrl}/c2", own=True), False),  # killed before it was made
        ("c3", Group(str(_group(resctrl / "gold"))), True),  # somebody else's
    ):
        (root / name).mkdir(parents=True)
        (root / name / "intel_rdt.json").write_bytes(encode(describe_group(group)))
        if name == "c1":
            (resctrl / "c1").mkdir()
        lifecycle.delete(str(root), name, force=True)
        assert not (root / name).exists() and Path(group.directory).exists() == there


def test_what_fails_half_way_leaves_nothing(resctrl: Path) -> None:
    # A directory of plain files has no schemata of its own: writing it fails after the directory was made.
    for asked in (read(memBwSchema="MB:0=20"), read(closID="gold", memBwSchema="MB:0=20")):
        with pytest.raises(RuntimeFailure, match="linux.intelRdt"):
            intel_rdt.join(asked, "c1", str(resctrl))
        assert {path.name for path in resctrl.iterdir()} == {"schemata", "tasks", "mon_groups"}
    with pytest.raises(RuntimeFailure, match="info is a directory of resctrl's own"):
        intel_rdt.join(read(), "info", str(resctrl))


def test_the_kernel_says_what_it_did_not_like(resctrl: Path) -> None:
    (resctrl / "info").mkdir()
    (resctrl / "info/last_cmd_status").write_text("The mask 5 has non-consecutive 1-bits\n")
    with pytest.raises(RuntimeFailure, match="write 'L3:0=5' to .*/c1/schemata: ENOENT") as caught:
        intel_rdt.join(read(l3CacheSchema="L3:0=5"), "c1", str(resctrl))
    assert caught.value.hint == "The mask 5 has non-consecutive 1-bits"


def test_an_update_can_be_taken_back(resctrl: Path) -> None:
    group = Group(str(_group(resctrl / "c1")), own=True)
    before = intel_rdt.update(group, ("MB:0=50",))
    assert before == ("MB:0=100;1=100",) and (resctrl / "c1/schemata").read_text().startswith("MB:0=50\n")


def test_where_it_is_not_mounted() -> None:
    if "resctrl" in Path("/proc/self/mounts").read_text():
        pytest.skip("this machine has resctrl mounted")
    with pytest.raises(
        RuntimeFailure, match="intelRdt is specified in config, but Intel RDT is not supported or enabled"
    ):
        intel_rdt.mount_point()


def test_figures(resctrl: Path) -> None:
    group = Group(str(_group(resctrl / "c1", "L3:0=7f0;1=1f\nMB:0=20;1=70\n")), own=True)
    assert intel_rdt.figures(None) == {}
    files = {
        "info/L3/cbm_mask": "7ff",
        "info/L3/min_cbm_bits": "1",
        "info/L3/num_closids": "16",
        "info/MB/bandwidth_gran": "10",
        "info/MB/delay_linear": "1",
        "info/MB/min_bandwidth": "10",
        "info/MB/num_closids": "8",
        "c1/mon_data/mon_L3_00/llc_occupancy": "123",
        "c1/mon_data/mon_L3_00/mbm_total_bytes": "456",
        "c1/mon_data/mon_L3_00/mbm_local_bytes": "400",
        "c1/mon_data/mon_L3_01/llc_occupancy": "Unavailable",
    }
    for name, text in files.items():
        (resctrl / name).parent.mkdir(parents=True, exist_ok=True)
        (resctrl / name).write_text(text + "\n")
    assert intel_rdt.figures(group) == {
        "l3_cache_info": {"cbm_mask": "7ff", "min_cbm_bits": 1, "num_closids": 16},
        "l3_cache_schema_root": "L3:0=7ff;1=7ff",
        "l3_cache_schema": "L3:0=7f0;1=1f",
        "mem_bw_info": {"bandwidth_gran": 10, "delay_linear": 1, "min_bandwidth": 10, "num_closids": 8},
        "mem_bw_schema_root": "MB:0=100;1=100",
        "mem_bw_schema": "MB:0=20;1=70",
        "schemata": ["L3:0=7f0;1=1f", "MB:0=20;1=70"],
        "mbm_stats": [{"mbm_total_bytes": 456, "mbm_local_bytes": 400}],
        "cmt_stats": [{"llc_occupancy": 123}],
    }
    assert intel_rdt.figures(Group(str(resctrl)))["l3_cache_schema"] == "L3:0=7ff;1=7ff"
