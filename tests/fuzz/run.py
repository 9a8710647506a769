"""One target under atheris, with what was found before as its corpus.

    python -m tests.fuzz.run NAME --seconds N --corpus DIRECTORY      fuzz
    python -m tests.fuzz.run NAME --input FILE                        run one input, without the fuzzer

Exit code 0: nothing was found. A crash's input is left beside the corpus as crash-….
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fuzz.run", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path(".cache/fuzz"))
    parser.add_argument("--input", type=Path)
    options = parser.parse_args()
    if options.input:
        from tests.fuzz.targets import TARGETS

        TARGETS[options.name].run(options.input.read_bytes())
        return
    import atheris

    with atheris.instrument_imports(include=["imagestore", "snapshotter"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[options.name]
    corpus = options.corpus / options.name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = [
        sys.argv[0],
        str(corpus),
        f"-max_total_time={options.seconds}",
        "-max_len=16384",
        "-timeout=20",
        "-rss_limit_mb=1024",
        f"-artifact_prefix={corpus}-",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup(words, target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
