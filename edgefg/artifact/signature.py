"""Ed25519 signatures, which prove who made an artifact, before the engine reads it.

The signature lies beside the manifest, as ``<manifest>.sig``: 64 bytes. It signs the bytes of the manifest, which hold
the SHA-256 of every other file. It needs the package `cryptography`, the extra ``sign``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from edgefg.artifact.manifest import check_artifact, decode_manifest, manifest_path
from edgefg.errors import DataError, IntegrityError, RuntimeUnavailableError, one_line
from edgefg.files import atomic_file

PUBLIC = "public.pem"
"""File name of the public key that `new_key` writes beside the private one."""
_BYTES = 64


def signature_path(model: Path) -> Path:
    """Return the path of the signature of a model file."""
    manifest = manifest_path(model)
    return manifest.with_name(f"{manifest.name}.sig")


def new_key(private: Path) -> Path:
    """Make a pair of keys as PEM files: ``private``, mode 0600, and ``public.pem`` beside it, whose path is returned.

    Raises:
        DataError: one of the files exists or cannot be written; then neither is written.
    """
    crypto = _cryptography()
    public = private.with_name(PUBLIC)
    if public == private:
        raise DataError(f"{private} is the name of the public key; choose another name for the private key")
    key = crypto.ed25519.Ed25519PrivateKey.generate()
    serial = crypto.serialization
    secret: bytes = key.private_bytes(serial.Encoding.PEM, serial.PrivateFormat.PKCS8, serial.NoEncryption())
    shown: bytes = key.public_key().public_bytes(serial.Encoding.PEM, serial.PublicFormat.SubjectPublicKeyInfo)
    made: list[Path] = []
    try:
        for path, content, mode in ((private, secret, 0o600), (public, shown, 0o644)):
            # Exclusively, and with its mode from the first moment on.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(path)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
    except OSError as exc:
        for path in made:
            path.unlink()
        if isinstance(exc, FileExistsError):
            raise DataError(f"{exc.filename} exists; keys are never overwritten: choose another file") from exc
        raise DataError(f"cannot write the keys: {exc}; choose a folder that can be written") from exc
    return public


def sign(model: Path, private: Path) -> Path:
    """Sign an artifact, after checking its files, and return the path of the signature.

    Args:
        model: the model file, or its manifest.
        private: PEM file of an Ed25519 private key without password.

    Raises:
        DataError: the key cannot be used, or the signature cannot be written.
        ManifestError: the manifest is truncated or inconsistent.
        IntegrityError: there is no manifest, or a file differs from it.
    """
    crypto = _cryptography()
    try:
        key = crypto.serialization.load_pem_private_key(private.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, crypto.unsupported) as exc:
        raise DataError(f"cannot use the private key {private}: {_reason(exc)}; give {_WANTED}") from exc
    if not isinstance(key, crypto.ed25519.Ed25519PrivateKey):
        raise DataError(f"{private} is a key of another kind, {type(key).__name__}; give {_WANTED}")
    manifest = manifest_path(model)
    try:
        data = manifest.read_bytes()
    except OSError as exc:
        raise IntegrityError(f"cannot read {manifest}: {exc.strerror}; give the model file of an artifact") from exc
    check_artifact(decode_manifest(data, manifest), model)  # who signs vouches for all of it
    signature = signature_path(model)
    try:
        with atomic_file(signature) as temporary:
            temporary.write_bytes(key.sign(data))
    except OSError as exc:
        raise DataError(f"cannot write {signature}: {exc.strerror}") from exc
    return signature


def verify_signature(model: Path, public: Path) -> None:
    """Check that a manifest was signed with the private key of ``public``; `check_artifact` compares the files.

    Args:
        model: the model file, or its manifest.
        public: PEM file of an Ed25519 public key.

    Raises:
        IntegrityError: there is no signature, it is not valid, or the key cannot be used.
    """
    crypto = _cryptography()
    try:
        key = crypto.serialization.load_pem_public_key(public.read_bytes())
    except (OSError, ValueError, crypto.unsupported) as exc:
        raise IntegrityError(
            f"cannot use the public key {public}: {_reason(exc)}; give the {PUBLIC} of `edgefg sign --new-key`"
        ) from exc
    if not isinstance(key, crypto.ed25519.Ed25519PublicKey):
        raise IntegrityError(f"{public} is a key of another kind, {type(key).__name__}; give an Ed25519 public key")
    path = signature_path(model)
    try:
        signature, manifest = path.read_bytes(), manifest_path(model).read_bytes()
    except OSError as exc:
        raise IntegrityError(f"cannot read {exc.filename}: {exc.strerror}; sign the artifact by `edgefg sign`") from exc
    if len(signature) != _BYTES:
        raise IntegrityError(
            f"{path} has {len(signature)} bytes, a signature has {_BYTES}; copy the artifact again, or sign it again"
        )
    try:
        key.verify(signature, manifest)
    except crypto.invalid as exc:
        raise IntegrityError(
            f"{path} is not {public.name}'s signature of {manifest_path(model).name}: the manifest, signature or"
            " key was replaced; do not use the artifact, get it again from its maker"
        ) from exc


_WANTED = "an Ed25519 key in a PEM file without password, as `edgefg sign --new-key` makes it"


class _Cryptography(NamedTuple):
    """The parts of the package `cryptography` that are used."""

    ed25519: Any
    serialization: Any
    invalid: type[Exception]
    unsupported: type[Exception]


def _cryptography() -> _Cryptography:
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as exc:
        raise RuntimeUnavailableError(
            "signatures need the package cryptography, which is not installed: pip install 'edgefg[sign]'"
        ) from exc
    return _Cryptography(ed25519, serialization, InvalidSignature, UnsupportedAlgorithm)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(error).split(". ")[0].rstrip(".")
