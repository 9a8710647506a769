"""python hack/editable.py SITE: this tree in that directory of packages, as `pip install -e .` would have put it there.

    SITE/ocid.pth                        the tree on the path: a plain line, as pip's import hook costs each start
    SITE/ocid-VERSION.dist-info/METADATA what pyproject.toml says of it, for who asks what is installed and needs what

pip would make an archive of the project first, with setuptools, for these two. Refuses the commands: runtime/install.py
and cri/install.py write those. Invariant: of several versions the last one alone is there.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(site: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for old in site.glob(f"{project['name']}-*.dist-info"):
        for path in sorted(old.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        old.rmdir()
    directory = site / f"{project['name']}-{project['version']}.dist-info"
    directory.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Python: {project['requires-python']}"]
    lines += [f"Requires-Dist: {one}" for one in project["dependencies"]]
    (directory / "METADATA").write_text("\n".join(lines) + "\n")
    (site / f"{project['name']}.pth").write_text(f"{ROOT}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
