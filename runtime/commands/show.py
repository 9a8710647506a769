"""`ocirun state`, `list` and `ps`."""

from __future__ import annotations

import os

from runtime import lifecycle
from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.options import Flag, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cli import Context
    from runtime.options import Values

FLAGS = {
    "state": (),
    "list": (
        Flag(("format", "f"), "str", "table or json (default: table)"),
        Flag(("quiet", "q"), "bool", "only the ids"),
    ),
    "ps": (Flag(("format", "f"), "str", "table or json (default: table)"),),
}
WORDS = {"state": "CONTAINER", "list": "", "ps": "CONTAINER [OPTIONS OF ps(1)]"}
_COLUMNS = ("id", "pid", "status", "bundle", "created", "owner")
_NARROWEST, _GAP = 12, 3  # of a column with its gap, and between columns: as runc has them, for who cuts by column


def run(context: Context, name: str, values: Values) -> int:
    if name == "list":
        if values.words:
            raise UsageError('"list" requires exactly 0 argument(s)')
        _list(context.root, _format(values), quiet=values.on("quiet"))
        return 0
    if not values.words or (name == "state" and len(values.words) > 1):
        how_many = "exactly" if name == "state" else "a minimum of"
        raise UsageError(f'"{name}" requires {how_many} 1 argument(s): {WORDS[name]}')
    if name == "state":
        import json

        _print(json.dumps(lifecycle.describe(context.root, values.words[0]), indent=2))
        return 0
    return _ps(context.root, values.words[0], _format(values), values.words[1:])


def _format(values: Values) -> str:
    text = values.text("format", "table")
    if text not in ("table", "json"):
        raise RuntimeFailure(f"invalid format option {text[:40]!r}", code="invalid_argument")
    return text


def _print(text: str) -> None:
    data = (text + "\n").encode("utf-8", "surrogateescape")
    while data:
        data = data[os.write(1, data) :]


def _list(root: str, style: str, *, quiet: bool) -> None:
    found = lifecycle.list_states(root)
    if quiet:
        for entry in found:
            _print(str(entry["id"]))
    elif style == "json":
        _print(encode(found).decode())
    else:
        rows = [[key.upper() for key in _COLUMNS], *([str(entry[key]) for key in _COLUMNS] for entry in found)]
        widths = [max(_NARROWEST, _GAP + max(len(row[i]) for row in rows)) for i in range(len(_COLUMNS))]
        for row in rows:
            _print("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _ps(root: str, container_id: str, style: str, options: list[str]) -> int:
    pids = lifecycle.pids(root, container_id)
    if style == "json":
        _print(encode(pids).decode())
        return 0
    import subprocess

    answer = subprocess.run(["ps", *(options or ["-ef"])], capture_output=True, check=False, timeout=30)
    lines = answer.stdout.decode("utf-8", "surrogateescape").splitlines()
    if answer.returncode or not lines:
        os.write(2, answer.stderr)
        return answer.returncode or 1
    try:
        column = lines[0].split().index("PID")
    except ValueError:
        raise RuntimeFailure(
            "couldn't find PID field in ps output", hint="the options of ps must include it", code="invalid_argument"
        ) from None
    wanted = {str(pid) for pid in pids}
    _print(lines[0])
    for line in lines[1:]:
        if line.split()[column : column + 1] and line.split()[column] in wanted:
            _print(line)
    return 0
