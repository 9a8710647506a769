"""What comes along with images, and many at once: signatures in copies, `sync`, templates, as skopeo has them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conformance.image_lane.bench import Bench, holds, same
from conformance.image_lane.cases import files, pushed

WHO = "conformance@example.com"


@contextmanager
def _gpg(directory: Path) -> Iterator[None]:
    """A key ring of gpg's with one key, for skopeo to sign by."""
    home = directory / "gnupg"
    home.mkdir(mode=0o700)
    before = os.environ.get("GNUPGHOME")
    os.environ["GNUPGHOME"] = str(home)
    try:
        make = ["gpg", "--batch", "--passphrase", "", "--quick-generate-key", WHO, "ed25519", "sign", "never"]
        subprocess.run(make, check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["gpgconf", "--kill", "all"], check=False, capture_output=True)
        os.environ.pop("GNUPGHOME")
        if before is not None:
            os.environ["GNUPGHOME"] = before


def signatures(bench: Bench) -> None:
    """Signed by skopeo: both carry the signatures along, to the same files, or refuse the same copies."""
    directory = bench.fresh("signatures")
    source, signed = pushed(bench, "layers"), bench.docker("signed/layers:1")
    with _gpg(directory):
        bench.skopeo("copy", "--sign-by", WHO, source, signed)
        bench.skopeo("copy", "--sign-by", WHO, "--sign-identity", signed[9:], signed, f"dir:{directory}/twice")
    bench.ocid("copy", signed, f"dir:{directory}/ours")
    bench.skopeo("copy", signed, f"dir:{directory}/theirs")
    same("dir:", files(directory / "ours"), files(directory / "theirs"))
    holds("there is a signature", (directory / "ours/signature-1").exists())
    bench.ocid("copy", f"dir:{directory}/twice", f"dir:{directory}/ours-twice")
    same("two of them", files(directory / "ours-twice"), files(directory / "twice"))
    for target in (f"oci:{directory}/layout:1", f"docker-archive:{directory}/archive"):
        for said in (bench.ocid_fails("copy", signed, target), bench.skopeo_fails("copy", signed, target)):
            holds(f"the reason is another: {said}", "ignature" in said)
    # What is signed cannot become Docker's: skopeo copies it as it is and does not say so, ocid refuses.
    bench.skopeo("copy", "--format=v2s2", signed, bench.docker("theirs/changed:1"))
    same("unchanged", bench.raw(bench.docker("theirs/changed:1")), bench.raw(signed))
    said = bench.ocid_fails("copy", "--format", "docker", signed, bench.docker("ours/changed:1"))
    holds(f"the reason is another: {said}", "would invalidate 1 signature" in said)
    for who, copy, change in (("ours", bench.ocid, "docker"), ("theirs", bench.skopeo, "v2s2")):
        copy("copy", "--remove-signatures", f"--format={change}", signed, f"dir:{directory}/{who}-bare")
    names = [sorted(files(directory / f"{who}-bare")) for who in ("ours", "theirs")]
    holds(f"a signature was not removed: {names}", not any("signature" in name for listed in names for name in listed))
    # Into a registry, each from the directory of the other: the same files of the same store.
    bench.ocid("copy", f"dir:{directory}/theirs", bench.docker("carried/ours:1"))
    bench.skopeo("copy", f"dir:{directory}/ours", bench.docker("carried/theirs:1"))
    store = bench.directory / "lookaside/carried"
    found = [files(next(store.glob(f"{who}@*"))) for who in ("ours", "theirs")]
    same("the lookaside store", *found)


def sync(bench: Bench) -> None:
    """Out of the registry, back, and from a list: the same directories and the same repositories."""
    directory = bench.fresh("sync")
    for tag in ("1", "2.0", "x"):
        bench.skopeo("copy", pushed(bench, "layers"), bench.docker(f"synced/layers:{tag}"))
    bench.skopeo("copy", "--all", pushed(bench, "multi", "--all"), bench.docker("synced/multi:1"))
    host = bench.address
    (directory / "list.yaml").write_text(
        f'{host}:\n  images: {{synced/multi: ["1"]}}\n  images-by-tag-regex: {{synced/layers: "^[12]"}}\n'
        "  tls-verify: false\n"  # of a list skopeo takes certificates from nowhere else
    )
    for options, kind, place in (
        ((), "docker", f"{host}/synced/layers"),
        (("--scoped",), "docker", f"{host}/synced/layers:2.0"),
        (("--all",), "docker", f"{host}/synced/multi"),
        (("--scoped",), "yaml", f"{directory}/list.yaml"),
    ):
        made = [directory / f"{who}-{kind}{len(options)}{place.count(':')}" for who in ("ours", "theirs")]
        bench.ocid("sync", "--src", kind, "--dest", "dir", *options, place, str(made[0]))
        made[1].mkdir()
        bench.skopeo("sync", "--src", kind, "--dest", "dir", *options, place, str(made[1]))
        same(f"{kind} {options} {place}", files(made[0]), files(made[1]))
    source = directory / "ours-docker01"
    bench.ocid_fails("sync", "--src", "docker", "--dest", "dir", f"{host}/synced/layers", str(source))
    bench.skopeo_fails("sync", "--src", "docker", "--dest", "dir", f"{host}/synced/layers", str(source))
    for who, command in (("ours", bench.ocid), ("theirs", bench.skopeo)):
        command("sync", "--src", "dir", "--dest", "docker", str(source), f"{host}/back-{who}")
        command("sync", "--src", "docker", "--dest", "docker", f"{host}/synced/layers:x", f"{host}/over-{who}/deep")
    for name in ("back-ours/layers:1", "back-ours/layers:2.0", "over-ours/deep/layers:x"):
        theirs = bench.docker(name.replace("ours", "theirs", 1))
        same(name, bench.raw(bench.docker(name)), bench.raw(theirs))


def templates(bench: Bench) -> None:
    """`inspect --format`."""
    source = pushed(bench, "nginx")
    for text in (
        "{{.Digest}}",
        "Name: {{.Name}} Digest: {{.Digest}}",
        "{{.Layers}} {{.Env}} {{.Labels}} {{.Created}}",
        "{{range .Layers}}{{.}} {{end}}{{len .Layers}}",
        '{{if eq .Os "linux"}}{{index .Env 0}}{{else}}no{{end}}',
        '{{range $i, $x := .Env}}{{$i}}={{printf "%q" $x}};{{end}}',
        "{{.Labels.nothing}}",
    ):
        same(
            text,
            bench.ocid("inspect", "--no-tags", "--format", text, source),
            bench.skopeo("inspect", "--format", text, source),
        )
    same("json", *(json.loads(bench.ocid("inspect", *more, source))["Layers"] for more in ((), ("-f", "{{json .}}"))))
    for text in ("{{.Nothing}}", "{{.", "{{end}}"):
        bench.ocid_fails("inspect", "--format", text, source)
        bench.skopeo_fails("inspect", "--format", text, source)


CASES = (signatures, sync, templates)
