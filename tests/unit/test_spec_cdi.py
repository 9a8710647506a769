"""CDI: spec files as they are read, and the edits that they make; on plain data and small files."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cri.api import api_pb2 as pb
from cri.spec import cdi, cdi_files
from cri.spec.validate import InvalidRequest

SPEC: dict[str, Any] = {
    "process": {"user": {"uid": 1000, "gid": 1001, "additionalGids": [1001]}, "env": ["A=old", "PATH=/bin"]},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": []}],
    "linux": {"devices": [{"path": "/dev/gone"}], "resources": {"devices": [{"allow": False, "access": "rwm"}]}},
}


def document(**edits: Any) -> dict[str, Any]:
    return {"cdiVersion": "1.0.0", "kind": "v.com/c", "devices": [{"name": "d", "containerEdits": edits}]}


def placed(directory: Path, *documents: Any, suffix: str = ".json") -> Path:
    directory.mkdir(exist_ok=True)
    for index, one in enumerate(documents):
        (directory / f"{index}{suffix}").write_text(one if isinstance(one, str) else json.dumps(one))
    return directory


def edited(directory: Path, *names: str, others: tuple[Path, ...] = ()) -> dict[str, Any]:
    spec = copy.deepcopy(SPEC)
    cdi.apply(spec, names or ("v.com/c=d",), (directory, *others))
    return spec


def test_devices_are_asked_for_in_either_way_and_once() -> None:
    config = pb.ContainerConfig(CDI_devices=[pb.CDIDevice(name="v.com/c=a")])
    config.annotations["cdi.k8s.io/plugin"] = "v.com/c=b,v.com/c=a"
    config.annotations["other"] = "v.com/c=z"
    assert cdi.requested(config) == ["v.com/c=a", "v.com/c=b"]


def test_every_edit_is_made_the_common_ones_first_and_once(tmp_path: Path) -> None:
    hook = {"hookName": "createRuntime", "path": "/bin/h", "args": ["h", "x"], "env": ["K=V"], "timeout": 5}
    one = {
        "env": ["A=new", "B=2"],
        "deviceNodes": [
            {"path": "/dev/gone", "hostPath": "/dev/null", "permissions": "rw"},
            {"path": "/dev/x", "type": "c", "major": 7, "minor": 8, "fileMode": 0o640, "uid": 0, "gid": 5},
        ],
        "mounts": [
            {"hostPath": "/usr/a", "containerPath": "/x/y/z", "options": ["ro"]},
            {"hostPath": "tmpfs", "containerPath": "/x", "type": "tmpfs"},
        ],
        "hooks": [hook],
        "additionalGids": [0, 7, 1001, 7],
        "intelRdt": {"closID": "g", "l3CacheSchema": "L3:0=f"},
    }
    made = document(**one)
    made["devices"].append({"name": "e", "containerEdits": {"env": ["A=last"]}})
    made["containerEdits"] = {"env": ["A=common", "COUNT=1"], "hooks": [{"hookName": "poststop", "path": "/bin/p"}]}
    spec = edited(placed(tmp_path / "cdi", made), "v.com/c=d", "v.com/c=e")
    assert spec["process"]["env"] == ["PATH=/bin", "COUNT=1", "B=2", "A=last"]
    null, x = spec["linux"]["devices"]
    assert null == {
        "path": "/dev/gone", "type": "c", "fileMode": os.stat("/dev/null").st_mode & 0o7777,
        "major": 1, "minor": 3, "uid": 1000, "gid": 1001,
    }  # fmt: skip
    assert (x["major"], x["minor"], x["fileMode"], x["uid"], x["gid"]) == (7, 8, 0o640, 0, 5)
    assert spec["linux"]["resources"]["devices"][1:] == [
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"},
        {"allow": True, "type": "c", "major": 7, "minor": 8, "access": "rwm"},
    ]
    assert [mount["destination"] for mount in spec["mounts"]] == ["/proc", "/x", "/x/y/z"]
    assert spec["mounts"][2] == {
        "destination": "/x/y/z", "type": "bind", "source": "/usr/a", "options": ["ro", "bind"],
    }  # fmt: skip
    assert spec["hooks"]["createRuntime"] == [{"path": "/bin/h", "args": ["h", "x"], "env": ["K=V"], "timeout": 5}]
    assert len(spec["hooks"]["poststop"]) == 1
    assert spec["process"]["user"]["additionalGids"] == [1001, 7]
    assert spec["linux"]["intelRdt"] == {"closID": "g", "l3CacheSchema": "L3:0=f"}


def test_yaml_says_the_same_and_is_read_once(tmp_path: Path) -> None:
    text = "cdiVersion: '0.6.0'\nkind: v.com/c\ndevices:\n- name: d\n  containerEdits:\n    env: [X=1]\n"
    directory = placed(tmp_path / "cdi", text, suffix=".yaml")
    assert "X=1" in edited(directory)["process"]["env"]
    file = cdi_files.read(f"{directory}/0.yaml")
    assert cdi_files.read(f"{directory}/0.yaml") is file
    (directory / "0.yaml").write_text(text.replace("X=1", "X=22"))
    assert "X=22" in edited(directory)["process"]["env"]


def test_a_later_directory_wins_and_one_directory_must_not_say_two_things(tmp_path: Path) -> None:
    early = placed(tmp_path / "early", document(env=["X=early"]))
    late = placed(tmp_path / "late", document(env=["X=late"]))
    assert "X=late" in edited(early, others=(late,))["process"]["env"]
    placed(late, document(env=["X=late"]), document(env=["X=other"]))
    with pytest.raises(InvalidRequest, match=r"ambiguous.*late/1.json"):
        edited(early, others=(late,))


@pytest.mark.parametrize("name", ["", "x", "v.com/c", "v.com/c=", "1v/c=d", "v.com/c=d e", "v.com/c=../x", "v/c=d\n"])
def test_names_are_qualified(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="no device name"):
        edited(placed(tmp_path / "cdi", document()), name)


def test_a_device_that_is_nowhere_is_named_with_the_files_that_could_not_be_used(tmp_path: Path) -> None:
    directory = placed(tmp_path / "cdi", document(), "{")
    assert edited(directory) == SPEC  # a broken file spoils nobody else's devices
    with pytest.raises(InvalidRequest, match=r"unresolvable CDI devices v.com/c=no; unusable spec files: .*1.json"):
        edited(directory, "v.com/c=no")
    with pytest.raises(InvalidRequest, match="unresolvable CDI devices v.com/c=d$"):
        edited(tmp_path / "none")


def _broken(**changes: Any) -> dict[str, Any]:
    return {**document(), **changes}


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (_broken(cdiVersion="9.0.0"), "cdiVersion: expected one of"),
        (_broken(kind="nokind"), "is not vendor.com/class"),
        (_broken(extra=1), "extra: unknown field"),
        (_broken(devices=[]), "devices: is empty"),
        (_broken(devices=[{"name": "d"}]), r"devices\[0\].containerEdits: is required"),
        (_broken(devices=[{"name": "-", "containerEdits": {}}]), "is no device name"),
        (_broken(devices=[{"name": "d", "containerEdits": {}}] * 2), "there twice"),
        ('{"kind": "v.com/c", "kind": "v.com/c"}', "duplicate key"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: 1\na: 2\n", "there twice"),
        ("[" * 100_000, ""),
    ],
)
def test_p7_files_that_are_not_what_the_specification_says(tmp_path: Path, made: Any, says: str) -> None:
    suffix = ".yaml" if isinstance(made, str) and not made.startswith(("{", "[")) else ".json"
    directory = placed(tmp_path / "cdi", made, suffix=suffix)
    with pytest.raises(InvalidRequest, match=f"unusable spec files: .*{says}"):
        edited(directory)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"env": ["novalue"]}, r"env\[0\]"),
        ({"unknown": []}, "unknown: unknown field"),
        ({"deviceNodes": [{"path": "/dev/x", "hostPath": "/no/such"}]}, r"\[0\].hostPath: /no/such: no such"),
        ({"deviceNodes": [{"path": "/dev/x", "hostPath": "/etc/passwd"}]}, "is no device"),
        ({"deviceNodes": [{"path": "/dev/x", "hostPath": "/dev/null", "type": "b"}]}, "no device of type b"),
        ({"deviceNodes": [{"path": "/dev/null", "permissions": "rx"}]}, "permissions"),
        ({"deviceNodes": [{"path": "/"}]}, r"deviceNodes\[0\].path"),
        ({"mounts": [{"hostPath": "rel", "containerPath": "/x"}]}, r"mounts\[0\].hostPath"),
        ({"mounts": [{"hostPath": "/x", "containerPath": "/proc"}]}, "containerPath"),
        ({"mounts": [{"hostPath": "/x"}]}, "containerPath: is required"),
        ({"hooks": [{"hookName": "never", "path": "/x"}]}, "hookName: expected one of"),
        ({"hooks": [{"hookName": "poststop", "path": "x"}]}, "absolute path"),
        ({"hooks": [{"hookName": "poststop", "path": "/x", "timeout": 0}]}, "timeout"),
        ({"additionalGids": [-1]}, "additionalGids"),
        ({"intelRdt": {"other": 1}}, "intelRdt.other: unknown field"),
        ({"netDevices": []}, "netDevices: unknown field"),
    ],
)
def test_edits_are_checked_by_file_and_field(tmp_path: Path, edits: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"CDI_devices: .*0.json: .*{says}"):
        edited(placed(tmp_path / "cdi", document(**edits)))


def test_who_may_write_a_file_may_run_as_root_so_only_root_may(tmp_path: Path) -> None:
    directory = placed(tmp_path / "cdi", document())
    (directory / "0.json").chmod(0o666)
    with pytest.raises(InvalidRequest, match="may be written by others"):
        edited(directory)
    (directory / "0.json").chmod(0o644)
    if os.geteuid() == 0:
        os.chown(directory / "0.json", 1000, 0)
        with pytest.raises(InvalidRequest, match="may be written by others"):
            edited(directory)


def test_files_are_bounded_in_kind_size_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "cdi"
    directory.mkdir()
    os.mkfifo(directory / "0.json")
    (directory / "1.json").symlink_to("/dev/zero")
    with pytest.raises(InvalidRequest, match=r"0.json: is no regular file; .*1.json: is no regular file"):
        edited(directory)
    (directory / "0.json").unlink()
    (directory / "1.json").unlink()
    placed(directory, document(), document(), document())
    monkeypatch.setattr(cdi_files, "MAX_FILE", 10)
    with pytest.raises(InvalidRequest, match="larger than 10 bytes"):
        edited(directory)
    monkeypatch.setattr(cdi_files, "MAX_FILES", 2)
    with pytest.raises(InvalidRequest, match="more than 2 spec files"):
        edited(directory)
