"""Signatures: what they prove, every way of failing said in one line, and nothing reaches the engine before."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519

from edgefg import Classifier, IntegrityError, RuntimeUnavailableError
from edgefg.artifact.signature import new_key, sign, signature_path, verify_signature
from edgefg.errors import DataError, EdgefgError
from tests.conftest import Run, Tiny

PEM = serialization.Encoding.PEM
OPENSSL_KEY = b"""-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
"""  # of RFC 8410, section 10.3


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one."""
    folder = tmp_path / "keys"
    folder.mkdir()
    return folder / "private.pem", new_key(folder / "private.pem")


@pytest.fixture
def signed(tiny: Tiny, keys: tuple[Path, Path]) -> Path:
    """A signed artifact."""
    model = tiny("ir")
    assert sign(model, keys[0]) == signature_path(model)
    return model


def _refused(model: Path, key: Path, kind: type[EdgefgError] = IntegrityError) -> str:
    with pytest.raises(kind) as caught:
        verify_signature(model, key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_signed_artifact_loads(signed: Path, keys: tuple[Path, Path]) -> None:
    assert signature_path(signed) == signed.parent / "model.json.sig"
    assert signature_path(signed).stat().st_size == 64
    verify_signature(signed, keys[1])
    with Classifier(signed, trusted_key=keys[1]) as classifier:
        assert classifier.labels
    with Classifier(signed):  # whoever does not ask is not bothered
        pass


def test_the_signature_is_ed25519_over_the_manifest_s_bytes(signed: Path, keys: tuple[Path, Path]) -> None:
    public = serialization.load_pem_public_key(keys[1].read_bytes())
    assert isinstance(public, ed25519.Ed25519PublicKey)
    public.verify(signature_path(signed).read_bytes(), signed.with_suffix(".json").read_bytes())


def test_keys_that_openssl_made_work(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(OPENSSL_KEY)
    private = serialization.load_pem_private_key(OPENSSL_KEY, None)
    public = private.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "pub.pem").write_bytes(public)
    model = tiny("onnx")
    sign(model, tmp_path / "key.pem")
    verify_signature(model, tmp_path / "pub.pem")


def tamper(model: Path) -> None:
    manifest = json.loads(model.with_suffix(".json").read_text())
    manifest["labels"].reverse()
    model.with_suffix(".json").write_text(json.dumps(manifest))


def one_bit(model: Path) -> None:
    data = bytearray(signature_path(model).read_bytes())
    data[40] ^= 1
    signature_path(model).write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (tamper, "is not public.pem's signature of model.json"),
        (
            lambda model: model.with_suffix(".json").write_bytes(model.with_suffix(".json").read_bytes() + b" "),
            "is not",
        ),
        (one_bit, "is not public.pem's signature of model.json"),
        (lambda model: signature_path(model).write_bytes(signature_path(model).read_bytes()[:-1]), "has 63 bytes"),
        (lambda model: signature_path(model).write_bytes(signature_path(model).read_bytes() + b"\n"), "has 65 bytes"),
        (lambda model: signature_path(model).write_bytes(b""), "has 0 bytes"),
        (lambda model: signature_path(model).unlink(), "model.json.sig: No such file or directory; sign the artifact"),
        (lambda model: model.with_suffix(".json").unlink(), "model.json: No such file or directory"),
    ],
)
def test_nothing_that_was_altered_reaches_the_engine(
    signed: Path, keys: tuple[Path, Path], spoil: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(signed)
    assert message in _refused(signed, keys[1])

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it went on")

    for later in ("read_manifest", "check_artifact", "load"):
        monkeypatch.setattr(f"edgefg.classifier.{later}", never)
    with pytest.raises(IntegrityError):
        Classifier(signed, trusted_key=keys[1])


def test_a_signature_of_another_artifact_by_the_same_key(signed: Path, keys: tuple[Path, Path], tiny: Tiny) -> None:
    other = tiny("onnx")
    sign(other, keys[0])
    shutil.copyfile(signature_path(other), signature_path(signed))
    assert "is not public.pem's signature" in _refused(signed, keys[1])


def test_a_signature_covers_every_file(signed: Path, keys: tuple[Path, Path]) -> None:
    weights = signed.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    verify_signature(signed, keys[1])
    with pytest.raises(IntegrityError, match="SHA-256"):
        Classifier(signed, trusted_key=keys[1])


def test_somebody_else_s_key(signed: Path, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    assert "is not public.pem's signature" in _refused(signed, new_key(tmp_path / "else" / "mine.pem"))


@pytest.mark.parametrize("content", [b"", b"no key\n", b"\xff\x00", b"-----BEGIN PUBLIC KEY-----\nAAAA\n", None])
def test_a_key_file_that_is_no_key(signed: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.pem"
    if content is not None:
        path.write_bytes(content)
    message = _refused(signed, path)
    assert message.startswith(f"cannot use the public key {path}: ")
    with pytest.raises(DataError, match=r"^cannot use the private key .*bad\.pem: "):
        sign(signed, path)


def test_the_wrong_half_of_the_pair(signed: Path, keys: tuple[Path, Path]) -> None:
    assert "cannot use the public key" in _refused(signed, keys[0])
    with pytest.raises(DataError, match="cannot use the private key"):
        sign(signed, keys[1])


def test_keys_of_another_kind_and_with_a_password(signed: Path, tmp_path: Path) -> None:
    other = x25519.X25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8
    (tmp_path / "x.pem").write_bytes(other.private_bytes(PEM, form, serialization.NoEncryption()))
    with pytest.raises(DataError, match="another kind, X25519PrivateKey; give an Ed25519 key"):
        sign(signed, tmp_path / "x.pem")
    public = other.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "x.pub").write_bytes(public)
    assert "another kind, X25519PublicKey" in _refused(signed, tmp_path / "x.pub")
    locked = serialization.BestAvailableEncryption(b"secret")
    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "locked.pem").write_bytes(key.private_bytes(PEM, form, locked))
    with pytest.raises(DataError, match=r"Password was not given.*without password"):
        sign(signed, tmp_path / "locked.pem")


def test_only_whole_artifacts_are_signed(tiny: Tiny, keys: tuple[Path, Path]) -> None:
    model = tiny("ir")
    model.with_suffix(".bin").write_bytes(b"else")
    with pytest.raises(IntegrityError, match="its manifest says"):
        sign(model, keys[0])
    assert not signature_path(model).exists()
    model.with_suffix(".json").unlink()
    with pytest.raises(IntegrityError, match=r"cannot read .*give the model file of an artifact"):
        sign(model, keys[0])


def test_new_keys_are_private_and_never_overwrite(tmp_path: Path) -> None:
    private = tmp_path / "private.pem"
    previous = os.umask(0)
    try:
        public = new_key(private)
    finally:
        os.umask(previous)
    assert public == tmp_path / "public.pem"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(DataError, match=r"private\.pem exists; keys are never overwritten"):
        new_key(private)
    with pytest.raises(DataError, match=r"public\.pem exists; keys are never overwritten"):
        new_key(tmp_path / "other.pem")
    assert (private.read_bytes(), public.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["private.pem", "public.pem"]  # no half of a pair
    with pytest.raises(DataError, match="is the name of the public key"):
        new_key(public)
    with pytest.raises(DataError, match="cannot write the keys"):
        new_key(tmp_path / "no" / "private.pem")


def test_without_the_package_the_extra_is_named(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return whole(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'edgefg[sign]'" in _refused(signed, keys[1], RuntimeUnavailableError)


def test_the_verb(run: Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("ir")
    status, out, err = run("sign", model, "--new-key", "private.pem")
    assert (status, err) == (0, "")
    assert out == f"public.pem is for your devices; keep private.pem secret\n{signature_path(model)}\n"
    verify_signature(model, Path("public.pem"))
    first = signature_path(model).read_bytes()
    tamper(model)
    assert run("sign", model, "--key", "private.pem")[0] == 0
    assert signature_path(model).read_bytes() != first
    verify_signature(model, Path("public.pem"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no key to sign with"),
        (["--key", "a.pem", "--new-key", "b.pem"], "exclude each other"),
        (["--key", "a.pem"], "cannot use the private key a.pem: No such file or directory"),
    ],
)
def test_a_mistake_at_the_verb_is_one_line_and_status_2(run: Run, tiny: Tiny, options: list[str], message: str) -> None:
    status, out, err = run("sign", tiny("ir"), *options)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
