"""What results say of themselves: content credentials that others can check, and a visible mark."""

from __future__ import annotations

import datetime
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beavervision.errors import OutputError, UsageError
from beavervision.media import Clip, Frames, Picture
from beavervision.stages.mark import Mark
from tests.media_factory import make_video
from tests.test_serve import face, started

__all__ = ["face"]  # a fixture


def authority(folder: Path) -> tuple[Path, Path, str]:
    """A certificate authority of our own: the chain and the key of a signing certificate, and the root."""
    pytest.importorskip("cryptography", reason="needs the extra dev")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> x509.Name:
        return x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"), x509.NameAttribute(NameOID.COMMON_NAME, text)]
        )

    now = datetime.datetime.now(datetime.UTC)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def usage(**on: bool) -> x509.KeyUsage:
        names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # type: ignore[assignment]
        return x509.KeyUsage(**{n: on.get(n, False) for n in names})

    def made(subject: str, public: Any, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("Root"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )
        if not ca:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
            )
        return builder.sign(root_key, hashes.SHA256())

    root, leaf = made("Root", root_key.public_key(), True), made("Signer", key.public_key(), False)
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "chain.pem", folder / "key.pem", root.public_bytes(pem).decode()


def checked(video: Path, root: str) -> dict[str, Any]:
    """What a reader that trusts `root` finds."""
    import c2pa

    settings = c2pa.Settings.from_dict({"verify": {"verify_trust": True}, "trust": {"user_anchors": root}})
    with c2pa.Context(settings) as context, c2pa.Reader(video, context=context) as reader:
        found: dict[str, Any] = json.loads(reader.json())
        return found


def test_a_signed_video_is_trusted_and_a_changed_one_is_not(tmp_path: Path) -> None:
    pytest.importorskip("c2pa", reason="needs the extra c2pa")
    from beavervision.serve.credentials import Credentials

    chain, key, root = authority(tmp_path)
    video = make_video(tmp_path / "a.mp4", pictures=10)
    Credentials(chain, key, "es256").sign(video, tmp_path / "b.mp4", "1.2", "beaver")
    found = checked(tmp_path / "b.mp4", root)
    assert found["validation_state"] == "Trusted", found
    manifest = found["manifests"][found["active_manifest"]]
    assert manifest["claim_generator_info"][0]["name"] == "BeaverVision"
    action = next(a for a in manifest["assertions"] if a["label"].startswith("c2pa.actions"))["data"]["actions"][0]
    assert action["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")

    other = tmp_path / "other"
    other.mkdir()
    assert checked(tmp_path / "b.mp4", authority(other)[2])["validation_state"] == "Valid"  # by nobody we know
    changed = bytearray((tmp_path / "b.mp4").read_bytes())
    at = changed.rindex(b"mdat") + 200
    changed[at] ^= 1
    (tmp_path / "c.mp4").write_bytes(changed)
    assert checked(tmp_path / "c.mp4", root)["validation_state"] == "Invalid"
    with pytest.raises(OutputError, match="cannot be signed"):
        Credentials(chain, key, "es256").sign(tmp_path / "none.mp4", tmp_path / "d.mp4", "1.2", "beaver")
    assert not (tmp_path / "d.mp4").exists()


def test_credentials_that_cannot_be_used_are_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("c2pa", reason="needs the extra c2pa")
    pytest.importorskip("fastapi", reason="the service needs the extra serve")
    from beavervision.serve.credentials import Credentials
    from beavervision.serve.service import Service
    from beavervision.settings import Settings

    chain, key, _ = authority(tmp_path)
    (tmp_path / "bad.pem").write_text("no key")
    for bad_chain, bad_key, algorithm in (
        (tmp_path / "none.pem", key, "es256"),
        (chain, tmp_path / "bad.pem", "es256"),
        (chain, key, "none"),
    ):
        with pytest.raises(UsageError, match="serve_c2pa_cert"):
            Credentials(bad_chain, bad_key, algorithm)
    folder = tmp_path / "serve"
    with pytest.raises(UsageError, match="serve_c2pa_cert"):
        Service(Settings(serve_folder=folder, data_dir=folder, serve_c2pa_cert="/none", serve_c2pa_key="/none"))
    with pytest.raises(UsageError, match="belong together"):
        Settings(serve_c2pa_cert="/none")


def test_a_server_signs_and_marks_what_it_makes(tmp_path: Path, face: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("c2pa", reason="needs the extra c2pa")
    pytest.importorskip("fastapi", reason="the service needs the extra serve")
    for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
        monkeypatch.delenv(name)
    chain, key, root = authority(tmp_path)
    server = started(tmp_path / "serve", serve_c2pa_cert=str(chain), serve_c2pa_key=str(key))
    try:
        fields: dict[str, bytes | str] = {"video": face, "text": "Hi.", "consent": "true"}
        marked = server.lipsync(fields | {"settings": '{"mark": true}'}).json
        plain = server.lipsync(fields).json
        files = {}
        for name, job in (("marked", marked), ("plain", plain)):
            files[name] = tmp_path / f"{name}.mp4"
            files[name].write_bytes(server.call("GET", f"/api/v1/jobs/{job['id']}/result").body)
            assert checked(files[name], root)["validation_state"] == "Trusted"
        assert server.get(f"/api/v1/jobs/{marked['id']}/report")["content_credentials"] is True
        assert server.files() == sorted(f"files/{job['id']}" for job in (marked, plain))
        from beavervision.stages.decode import Decode, probe

        one, other = (
            next(iter(Decode(1, extend="none")(probe(files[name])))).frames.pictures[0] for name in ("marked", "plain")
        )
        changed = np.abs(one.y.astype(int) - other.y).max(axis=1) > 60
        assert changed[-40:].any()
        assert not changed[:-60].any()
    finally:
        server.kill()


@pytest.mark.parametrize("size", [(1280, 720), (256, 256), (96, 64), (720, 1280), (32, 32)])
def test_the_mark_is_seen_at_the_lower_right_and_nothing_else_changes(size: tuple[int, int]) -> None:
    width, height = size
    rng = np.random.default_rng(0)
    y, u, v = (rng.integers(60, 160, shape, np.uint8) for shape in ((height, width), *[(height // 2, width // 2)] * 2))
    picture = Picture(y, u, v)
    before = y.copy()
    clip = Clip(Frames((picture,) * 3, 0, Fraction(25)))
    (marked,) = Mark()(iter([clip]))
    done = marked.frames.pictures[0]
    assert all(p is done for p in marked.frames.pictures)  # a still stays a still
    np.testing.assert_array_equal(picture.y, before)
    rows, columns = np.nonzero(done.y != y)
    assert len(rows) > 20
    assert width < 64 or done.y.max() > 170
    assert rows.min() > height * 0.45
    if width >= 256:
        assert rows.min() > height * 0.85
        assert columns.min() > width * 0.3
        assert columns.max() < width - 2
    chroma = np.nonzero(done.u != u)[0]
    assert chroma.min() >= rows.min() // 2 - 1
