"""RFC 3161 times and entries of Rekor 2: what must not pass for one. Tokens are `openssl ts`'s, or, where that refuses,
put together by `openssl cms` (tests/vectors.py has the rest)."""

from __future__ import annotations

import base64
import calendar
import json
import re
import time as clock
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imagestore.config import StoreConfig
from imagestore.model import PolicyInvalid
from imagestore.policy import Material
from imagestore.signatures import Bundle
from imagestore.timestamps import Untimed, authorities, time_of
from imagestore.trust import Trust
from imagestore.verdict import Verdict
from tests.trust_table import MAIL, Wanted, case, fulcio_of_bundles
from tests.unit.test_trust_table import judged
from tests.vectors import Maker, b64, compact

ROW = "… fulcio caPath + rekorPublicKeyPath, bundle of Rekor 2 with RFC 3161 time"
WANTED = Wanted()
DATA = b"a signature"


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    found = Maker(tmp_path_factory.mktemp("vectors"))
    found.stamper("stamper", "tsa")
    yield found
    found.close()


def time(token: bytes, *files: Path, data: bytes = DATA) -> int:
    trusted = authorities(Material("stampers", data=b"".join(path.read_bytes() for path in files)))
    assert trusted is not None
    return time_of(token, data, trusted)


def info(maker: Maker, at: str = "", data: bytes = DATA) -> bytes:
    """What a token about `data` says, with another time `at` of equal length."""
    token = maker._openssl("ts", "-reply", "-in", "reply", "-token_out", data=maker.stamp("stamper", data))
    said = maker._openssl("cms", "-verify", "-noverify", "-inform", "DER", "-binary", data=token)
    found = re.search(rb"\x18\x0f(\d{14}Z)", said)
    assert found is not None
    return said.replace(found[1], at.encode()) if at else said


def signed(maker: Maker, said: bytes, name: str) -> bytes:
    """A response with `said`, signed by `name` whatever its certificate is for."""
    content = maker._openssl(
        "cms", "-sign", "-binary", "-nodetach", "-nosmimecap", "-md", "sha256", "-outform", "DER",
        "-econtent_type", "1.2.840.113549.1.9.16.1.4", "-signer", f"{name}.tsa.pem", "-inkey", f"{name}.key",
        data=said,
    )  # fmt: skip
    inner = b"\x30\x03\x02\x01\x00" + content
    return b"\x30\x82" + len(inner).to_bytes(2, "big") + inner


# -------------------------------------------------------------------------------------------------------------- tokens


def test_the_time_is_that_of_the_token(maker: Maker) -> None:
    before = int(clock.time())
    assert before <= time(maker.stamp("stamper", DATA), maker.authority("tsa")) <= clock.time() + 1
    at = clock.strftime("%Y%m%d%H%M%SZ", clock.gmtime(clock.time() + 7200))
    token = signed(maker, info(maker, at), "stamper")
    assert time(token, maker.authority("tsa")) == calendar.timegm(clock.strptime(at, "%Y%m%d%H%M%SZ"))


@pytest.mark.parametrize("what", ["other data", "another authority", "altered time", "garbage", "truncated", "refused"])
def test_tokens_that_say_nothing(maker: Maker, what: str) -> None:
    token, root = maker.stamp("stamper", DATA), maker.authority("tsa")
    if what == "another authority":
        maker.stamper("other", "other-tsa")
        token = maker.stamp("other", DATA)
    elif what == "altered time":
        year = re.search(rb"\x18\x0f(20\d\d)", token)
        assert year is not None
        token = token[: year.start(1)] + b"2099" + token[year.end(1) :]
    elif what == "garbage":
        token = b"\x30\x03\x02\x01\x00"
    elif what == "truncated":
        token = token[:-10]
    elif what == "refused":  # PKIStatusInfo: granted becomes rejection
        at = token.index(b"\x30\x03\x02\x01\x00")
        token = token[: at + 4] + b"\x02" + token[at + 5 :]
    with pytest.raises(Untimed):
        time(token, root, data=b"another signature" if what == "other data" else DATA)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("not-for-times", {"usage": "critical,codeSigning"}),
        ("not-critical", {"usage": "timeStamping"}),
        ("ended", {"of_2020": True}),
    ],
)
def test_authorities_whose_certificate_is_none(maker: Maker, name: str, how: dict[str, Any]) -> None:
    maker.stamper(name, "tsa", **how)
    with pytest.raises(Untimed):
        time(signed(maker, info(maker), name), maker.authority("tsa"))
    if name == "ended":  # what counts is the time that it tells, not today
        old = signed(maker, info(maker, "20200101120000Z"), name)
        with pytest.raises(Untimed, match="2020"):
            time(old, maker.authority("tsa"))  # but the root is of today


def test_a_signer_that_is_not_in_the_chain_of_the_one_that_is_named(maker: Maker) -> None:
    """A good authority's certificate beside a signature by somebody else."""
    maker.stamper("evil", "evil-tsa")
    made = maker._openssl(
        "cms", "-sign", "-binary", "-nodetach", "-nosmimecap", "-md", "sha256", "-outform", "DER",
        "-econtent_type", "1.2.840.113549.1.9.16.1.4", "-signer", "evil.tsa.pem", "-inkey", "evil.key",
        "-certfile", "stamper.tsa.pem", data=info(maker),
    )  # fmt: skip
    inner = b"\x30\x03\x02\x01\x00" + made
    with pytest.raises(Untimed):
        time(b"\x30\x82" + len(inner).to_bytes(2, "big") + inner, maker.authority("tsa"))


def test_a_token_without_its_certificate(maker: Maker) -> None:
    token = maker.stamp("stamper", DATA, certificate=False)
    with pytest.raises(Untimed):
        time(token, maker.authority("tsa"))
    maker.stamper("second", "tsa")
    files = [maker.directory / f"{name}.tsa.pem" for name in ("second", "stamper")]
    assert time(token, maker.authority("tsa"), *files)
    with pytest.raises(Untimed):
        time(token, maker.authority("tsa"), files[0])


def test_authorities_below_an_intermediate(maker: Maker) -> None:
    maker.authority("tsa")
    middle = maker.between("tsa-middle", "tsa")
    maker.stamper("below", "tsa-middle")
    token = maker.stamp("below", DATA)
    assert time(token, maker.authority("tsa"), middle)
    with pytest.raises(Untimed):
        time(token, maker.authority("tsa"))


def test_files_of_authorities(maker: Maker, tmp_path: Path) -> None:
    assert authorities(None) is None
    for data, says in (
        (b"", "no certificate in it is a root"),
        (maker.stamper("stamper", "tsa").read_bytes(), "a root"),
    ):
        with pytest.raises(PolicyInvalid, match=says):
            authorities(Material("image.timestamp_authorities", data=data))
    with pytest.raises(PolicyInvalid, match=r"image.timestamp_authorities /nowhere"):
        authorities(Material("image.timestamp_authorities", Path("/nowhere")))


# ------------------------------------------------------------------------------------------------------------- bundles


def edited(found: Bundle, edit: Callable[[dict[str, Any]], None]) -> Bundle:
    document = json.loads(found.data)
    edit(document["verificationMaterial"])
    return replace(found, data=compact(document))


def verdict(maker: Maker, bundle: Bundle, *, stampers: bool = True) -> Verdict:
    return judged(fulcio_of_bundles(maker), bundle, maker.now + 60, maker.authority("tsa") if stampers else None)


def good(maker: Maker) -> Bundle:
    found = case(maker, ROW, "good", WANTED)[1]
    assert isinstance(found, Bundle)
    return found


def refused(maker: Maker, bundle: Bundle, says: str, *, stampers: bool = True) -> None:
    found = verdict(maker, bundle, stampers=stampers)
    assert not found.accepted
    assert says in found.outcomes[0].sentence(), found.outcomes[0].sentence()


def test_a_certificate_needs_a_time_that_somebody_signed(maker: Maker) -> None:
    bundle = good(maker)
    assert "with the time of an authority" in verdict(maker, bundle).outcomes[0].by
    refused(maker, bundle, "image.timestamp_authorities", stampers=False)
    refused(maker, edited(bundle, lambda it: it.pop("timestampVerificationData")), "has no RFC 3161 timestamp")
    # The entry's own time is the log's word only with a promise.
    timed = edited(bundle, lambda it: it["tlogEntries"][0].update(integratedTime=str(maker.now)))
    refused(maker, edited(timed, lambda it: it.pop("timestampVerificationData")), "has no RFC 3161 timestamp")

    def other(material: dict[str, Any]) -> None:
        stamp = {"signedTimestamp": b64(maker.stamp("stamper", b"another signature"))}
        material["timestampVerificationData"] = {"rfc3161Timestamps": [stamp]}

    refused(maker, edited(bundle, other), "or not of this")


def test_a_certificate_must_have_been_good_whenever_somebody_says_that_it_was_used(maker: Maker) -> None:
    """The log says: today, while it was; an authority says: in three days, too."""
    leaf = maker.leaf("fulcio-email-release", "fulcio", f"email:{MAIL}")
    bundle = maker.bundle(leaf.key, WANTED.digest, WANTED.name, certificate=leaf, log="log")
    signature = base64.b64decode(json.loads(bundle.data)["dsseEnvelope"]["signatures"][0]["sig"])

    def stamped(days: int) -> Bundle:
        at = clock.strftime("%Y%m%d%H%M%SZ", clock.gmtime(clock.time() + days * 86400 + 60))
        token = b64(signed(maker, info(maker, at, signature), "stamper"))
        stamps = {"rfc3161Timestamps": [{"signedTimestamp": token}]}
        return edited(bundle, lambda it: it.update(timestampVerificationData=stamps))

    assert verdict(maker, bundle).accepted
    assert verdict(maker, stamped(0)).accepted
    refused(maker, stamped(3), "not good at")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("digest", "about another payload"),
        ("algorithm", "no SHA-2"),
        ("content", "about another signature"),
        ("verifier", "by another key or certificate"),
        ("kind", "expected hashedrekord or dsse"),
        ("unproven", "neither a signed timestamp nor a proof"),
    ],
)
def test_entries_about_something_else(maker: Maker, what: str, says: str) -> None:
    """True entries of the log: each has a proof of its own."""

    def edit(material: dict[str, Any]) -> None:
        (entry,) = material["tlogEntries"]
        body = json.loads(base64.b64decode(entry["canonicalizedBody"]))
        record = body["spec"]["hashedRekordV002"]
        if what == "digest":
            record["data"]["digest"] = b64(bytes(32))
        elif what == "algorithm":
            record["data"]["algorithm"] = "SHA1"
        elif what == "content":
            record["signature"]["content"] = b64(b"another")
        elif what == "verifier":
            other = maker.leaf("fulcio-email-somebody", "fulcio", "email:somebody@example.com")
            der = b"".join(line for line in other.pem.splitlines() if b"---" not in line)
            record["signature"]["verifier"]["x509Certificate"]["rawBytes"] = der.decode()
        elif what == "kind":
            body["kind"] = "intoto"
        data = compact(body)
        entry.update(canonicalizedBody=b64(data), inclusionProof=maker.proof("log", data))
        if what == "unproven":
            del entry["inclusionProof"]

    refused(maker, edited(good(maker), edit), says)


def test_a_log_that_the_policy_does_not_name(maker: Maker) -> None:
    def edit(material: dict[str, Any]) -> None:
        (entry,) = material["tlogEntries"]
        entry["inclusionProof"] = maker.proof("evil-log", base64.b64decode(entry["canonicalizedBody"]))

    maker.public("evil-log")
    refused(maker, edited(good(maker), edit), "signed by no log that the policy trusts")


def test_witnesses_and_logs_of_ed25519(maker: Maker) -> None:
    """A checkpoint that others have signed first, and a log whose key is of the kind that Rekor 2's are."""
    log = maker.public("log-ed25519", "ed25519")
    requirement = {**fulcio_of_bundles(maker), "rekorPublicKeyPath": str(log)}

    def edit(material: dict[str, Any]) -> None:
        (entry,) = material["tlogEntries"]
        proof = maker.proof("log", base64.b64decode(entry["canonicalizedBody"]))
        note = proof["checkpoint"]["envelope"].partition("\n\n")[0] + "\n"  # type: ignore[index]
        witness = "".join(f"\u2014 witness-{number} {b64(bytes(76))}\n" for number in range(20))
        line = b64(b"\x05\x06\x07\x08" + maker.sign("log-ed25519", note.encode(), "ed25519"))
        proof["checkpoint"] = {"envelope": f"{note}\n{witness}\u2014 log.example {line}\n"}
        entry["inclusionProof"] = proof

    found = judged(requirement, edited(good(maker), edit), maker.now, maker.authority("tsa"))
    assert found.accepted, found.outcomes[0].sentence()


def test_another_file_of_authorities_is_another_policy(maker: Maker, tmp_path: Path) -> None:
    """What was accepted is looked at again once the authorities have changed."""
    policy, stampers = tmp_path / "policy.json", tmp_path / "stampers.pem"
    policy.write_text(json.dumps({"default": [fulcio_of_bundles(maker)]}))
    stampers.write_bytes(maker.authority("tsa").read_bytes())
    trust = Trust(StoreConfig(policy=policy, timestamp_authorities=stampers))
    before = trust._current("")[0]
    assert trust._current("")[0] == before
    stampers.write_bytes(maker.authority("other-tsa").read_bytes())
    assert trust._current("")[0] != before
