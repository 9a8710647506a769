"""cri.spec.users: numbers, names, groups; the rows of threats.md about USER."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cri.spec.users import Database, Databases, UserRequest, parse_database, read_database, resolve
from cri.spec.validate import InvalidRequest

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:Web:/srv/www:/bin/sh\nbroken\nbig:x:4294967296:0::/:/bin/sh\n"
GROUP = b"root:x:0:\nweb:x:34:\nlogs:x:50:web,other\nadm:x:4:other\n"
IMAGE = parse_database(PASSWD, GROUP)


def ask(image_user: str = "", **rest: object) -> tuple[int, int, tuple[int, ...]]:
    user = resolve(UserRequest(image_user, **rest), lambda: IMAGE)  # type: ignore[arg-type]
    return user.uid, user.gid, user.groups


def test_nothing_said_is_root_of_the_image() -> None:
    assert ask() == (0, 0, (0,))
    assert resolve(UserRequest(), lambda: IMAGE).home == "/root"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web", (33, 34, (34, 50))),
        ("33", (33, 34, (34, 50))),
        ("web:logs", (33, 50, (50,))),
        ("web:7", (33, 7, (7,))),
        ("1234", (1234, 0, (0,))),
        ("1234:logs", (1234, 50, (50,))),
        ("01", (1, 0, (0,))),
        ("1:", (1, 0, (0,))),
    ],
)
def test_s15_image_user_means_what_it_says(text: str, expected: tuple[int, int, tuple[int, ...]]) -> None:
    assert ask(text) == expected


def test_s16_a_number_is_never_looked_up_as_a_name() -> None:
    hostile = parse_database(b"1000:x:0:0::/:/bin/sh\n", b"1000:x:0:\n")
    user = resolve(UserRequest("1000:1000"), lambda: hostile)
    assert (user.uid, user.gid) == (1000, 1000)


BAD = [
    "4294967296",
    "2147483648",
    "65536:4294967297",
    "-1",
    "4294967295",
    "１",
    "1_000",
    " 1",
    "+1",
    "1 ",
    "0x",
    "a:b:c",
    "a\nb",
]


@pytest.mark.parametrize("text", BAD)
def test_s32_s33_numbers_out_of_range_are_errors_even_when_the_image_has_such_a_name(text: str) -> None:
    name = text.partition(":")[0]
    hostile = Database(((name, 0, 0, "/"),), ((text.partition(":")[2], 0, ()),)) if name != "0x" else Database()
    with pytest.raises(InvalidRequest):
        resolve(UserRequest(text), lambda: hostile)


def test_s62_the_primary_group_is_supplementary_too_in_both_policies() -> None:
    for strict in (False, True):
        uid, gid, groups = ask(uid=33, gid=2000, supplemental=(7, 8), strict=strict)
        assert (uid, gid) == (33, 2000)
        assert gid in groups and {7, 8} <= set(groups)
        assert (50 in groups) is not strict


def test_run_as_username_must_exist() -> None:
    assert ask(username="web") == (33, 34, (34, 50))
    with pytest.raises(InvalidRequest, match="no user 'nobody'"):
        ask(username="nobody")


def test_a_group_without_a_user_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="run_as_group"):
        ask(gid=5)


def test_s61_a_home_with_a_control_character_is_not_used() -> None:
    hostile = Database((("u", 5, 5, "/x\x0bLD_PRELOAD=1"),), ())
    assert resolve(UserRequest("u"), lambda: hostile).home == "/"


def layer(root: Path, name: str) -> Path:
    (root / name / "etc").mkdir(parents=True)
    return root / name


def test_s42_hostile_databases_are_refused_at_once(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"evil:x:0:0::/:/bin/sh\n")

    def plant(name: str) -> Path:
        return layer(tmp_path, name) / "etc" / "passwd"

    os.mkfifo(plant("fifo"))
    plant("device").symlink_to("/dev/zero")
    plant("directory").mkdir()
    with plant("huge").open("wb") as file:
        file.truncate(5 << 30)
    for name in ("fifo", "directory", "huge"):
        with pytest.raises(InvalidRequest, match="/etc/passwd"):
            read_database([tmp_path / name])
    # An absolute link is followed in the image's root, where there is no such file.
    plant("host").symlink_to(outside)
    for name in ("device", "host"):
        assert read_database([tmp_path / name]).passwd == ()


def test_an_absolute_link_inside_the_image_works(tmp_path: Path) -> None:
    root = layer(tmp_path, "nix")
    (root / "store").mkdir()
    (root / "store" / "passwd").write_bytes(PASSWD)
    (root / "etc" / "passwd").symlink_to("/store/passwd")
    assert read_database([root]).passwd[1] == ("web", 33, 34, "/srv/www")


def test_a_database_is_read_once_for_a_chain_id_unless_it_is_large_or_many_came_since(tmp_path: Path) -> None:
    kept, asked = Databases(), []

    def layers(name: str, users: int = 1) -> Callable[[], list[Path]]:
        (tmp_path / name / "etc").mkdir(parents=True, exist_ok=True)
        lines = "".join(f"u{number}:x:{number}:{number}::/:/bin/sh\n" for number in range(users))
        (tmp_path / name / "etc" / "passwd").write_text(lines)

        def asking() -> list[Path]:
            asked.append(name)
            return [tmp_path / name]

        return asking

    small, large = layers("small"), layers("large", 1000)
    for _ in range(2):
        assert [row[0] for row in kept.of("small", small).passwd] == ["u0"]
        assert len(kept.of("large", large).passwd) == 1000
    assert asked == ["small", "large", "large"]
    for number in range(100):  # of which `small` is the last but one, each time
        kept.of(f"chain{number}", small)
        kept.of("small", small)
    assert asked.count("small") == 101
    for number in range(100):
        kept.of(f"other{number}", small)
    kept.of("small", small)
    assert asked.count("small") == 202
