"""The verb that vouches for an artifact: sign."""

from __future__ import annotations

from pathlib import Path

from edgefg.cli.app import command
from edgefg.errors import DataError


@command
def sign(artifact: Path, key: Path | None = None, new_key: Path | None = None) -> None:
    """Sign an artifact with an Ed25519 key, so that a device can refuse what you did not make.

    On the device: Classifier(path, trusted_key="public.pem"). Every file is compared with the manifest before it is
    signed.

    Args:
        artifact: the model file; the signature goes beside its manifest.
        key: the private key, a PEM file.
        new_key: make a pair of keys first, the private one in this file and public.pem beside it, and sign with it.
    """
    from edgefg.artifact.signature import new_key as make
    from edgefg.artifact.signature import sign as run

    if key is not None and new_key is not None:
        raise DataError("--key and --new-key were both given; needed the one that signs")
    private = key or new_key
    if private is None:
        raise DataError("nothing to sign with; needed --key private.pem, or --new-key private.pem to make a pair")
    if new_key is not None:
        print(f"{make(new_key)} is for your devices; keep {new_key} to yourself")
    print(run(artifact, private))
