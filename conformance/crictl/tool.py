"""crictl as a subprocess: arguments in, what it printed out. Refuses nothing; `ok` and `fails` judge the exit code."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CALL_S = 120


class CheckFailed(Exception):
    """crictl, or what it did, is not as it should be: one sentence with what it printed."""


def built() -> Path:
    """The crictl that conformance/go.mod pins, built when it is not there yet."""
    result = subprocess.run([ROOT / "hack" / "crictl"], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit("crictl cannot be built: see above")
    return Path(result.stdout.strip())


@dataclass(frozen=True, slots=True)
class Crictl:
    """crictl against one socket; `config` is an empty file, so that no configuration of this machine is read."""

    binary: Path
    socket: Path
    config: Path

    def command(self, *arguments: object) -> list[str]:
        """The words to run it with."""
        endpoint = f"unix://{self.socket}"
        command = [str(self.binary), "--config", str(self.config), "--runtime-endpoint", endpoint]
        return [*command, "--image-endpoint", endpoint, "--timeout", "60s", *map(str, arguments)]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
        )

    def piped(self, data: bytes, *arguments: object) -> subprocess.CompletedProcess[bytes]:
        """With `data` as its input."""
        return subprocess.run(self.command(*arguments), input=data, capture_output=True, timeout=CALL_S, check=False)

    def ok(self, *arguments: object) -> str:
        """What it prints on success."""
        result = self.run(*arguments)
        if result.returncode != 0:
            raise CheckFailed(
                f"crictl {' '.join(map(str, arguments))} exits {result.returncode}: {result.stderr.strip()}"
            )
        return result.stdout.strip()

    def json(self, *arguments: object) -> Any:
        return json.loads(self.ok(*arguments))

    def fails(self, *arguments: object) -> str:
        """What it prints on failure, which is what should happen."""
        result = self.run(*arguments)
        if result.returncode == 0:
            raise CheckFailed(f"crictl {' '.join(map(str, arguments))} succeeds: {result.stdout.strip()}")
        return result.stderr.strip() + result.stdout.strip()
