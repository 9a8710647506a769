"""python -m conformance.trust [pytest's arguments]

Builds the judge (main.go: containers/image, as go.mod pins it) where it is not there yet, and gives it every cell of
the table in docs/trust.md that it knows (tests/peers). Needs a Go compiler. Exit code 1 when one verdict is another.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Without what is not asked: GPGME, docker's daemon, the storage library.
TAGS = "containers_image_openpgp containers_image_docker_daemon_stub containers_image_storage_stub"


def built() -> Path:
    """The judge, by the hash of what it is made of."""
    sources = b"".join((HERE / name).read_bytes() for name in ("main.go", "go.mod", "go.sum"))
    target = ROOT / ".cache" / f"judge-{hashlib.sha256(sources).hexdigest()[:12]}"
    if not target.exists():
        compiler = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin")
        if compiler is None:
            raise SystemExit("no Go compiler is here, so the judge cannot be built")
        target.parent.mkdir(exist_ok=True)
        print("building the judge (containers/image); this takes minutes, once", file=sys.stderr, flush=True)
        # The other name: a build that was interrupted must not look like one that is done.
        part = target.with_suffix(".part")
        words = [compiler, "build", "-trimpath", "-mod=readonly", "-tags", TAGS, "-o", str(part), "."]
        subprocess.run(words, cwd=HERE, check=True, env={**os.environ, "CGO_ENABLED": "0"})
        part.rename(target)
    return target


def main() -> int:
    environment = {**os.environ, "OCID_JUDGE": str(built())}
    words = [sys.executable, "-m", "pytest", "-q", *(sys.argv[1:] or ["tests/peers"])]
    return subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
