"""The ONNX artifacts that plans are built from: read and checked, and copied beside the plan."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from edgefg.artifact.hashes import FileInfo
from edgefg.artifact.manifest import Manifest, check_artifact, manifest_path, read_manifest
from edgefg.artifact.signature import signature_path, verify_signature
from edgefg.errors import BuildError, DataError, ManifestError
from edgefg.files import sync

BuildPrecision = Literal["auto", "int8", "fp16", "fp32"]
"""Which of several models to build; ``auto`` builds all of them."""


class Source(NamedTuple):
    """An ONNX artifact to build from."""

    model: Path
    manifest: Manifest

    @property
    def file(self) -> FileInfo:
        """The ONNX file as its manifest lists it; both were compared when the manifest was read."""
        return next(file for file in self.manifest.files if file.name == self.manifest.model)


def read_sources(models: Sequence[Path], precision: BuildPrecision, trusted_key: Path | None) -> list[Source]:
    """Read ONNX artifacts, check them, and return those of a precision; see `build_engine`."""
    sources = []
    for model in models:
        if model.suffix.lower() != ".onnx":
            raise DataError(f"{model} is not an ONNX file; give the model.onnx of `edgefg export --to tensorrt-onnx`")
        if trusted_key is not None:
            verify_signature(model, trusted_key)
        manifest = read_manifest(model)
        check_artifact(manifest, model)
        if manifest.golden is None:
            raise ManifestError(f"{model} has no golden set to prove a plan with; export it again")
        sources.append(Source(model, manifest))
    first = sources[0]
    for model, manifest in sources[1:]:
        if (manifest.labels, manifest.input) != (first.manifest.labels, first.manifest.input):
            raise DataError(
                f"{model} has other labels or another input than {first.model}; give models of the same network"
            )
    chosen = [source for source in sources if precision in ("auto", source.manifest.precision)]
    if not chosen:
        found = ", ".join(sorted({source.manifest.precision for source in sources}))
        raise DataError(f"--precision {precision} was given, but the models are {found}; export one in {precision}")
    return chosen


def folder_for(sources: list[Source], out: Path | None) -> Path:
    """Return the folder of the plan."""
    if out is None and len({source.model.parent.resolve() for source in sources}) > 1:
        raise DataError("models of several folders were given; name a folder for the plan by --out")
    return out or sources[0].model.parent


def keep_other_artifacts(sources: list[Source], folder: Path) -> None:
    """Raise `DataError` if an ONNX artifact of the user would be replaced by another one."""
    outside = [source.model for source in sources if source.model.parent.resolve() != folder.resolve()]
    for path in sorted({folder / name for source in sources for name in _names_of(source)}):
        if not path.exists():
            continue
        others = [model.with_name(path.name).read_bytes() for model in outside if model.with_name(path.name).exists()]
        same = others.count(path.read_bytes())
        # Where no model lies in the folder, what an earlier call took of these very models may go.
        if same < len(others) if len(outside) < len(sources) else not same:
            raise DataError(f"{path} is another artifact's, which would be replaced; name a new folder by --out")


def copy_source(source: Source, folder: Path, staging: Path) -> None:
    """Copy the ONNX artifact beside the plan, unless it is there: rebuilding needs it."""
    if source.model.parent.resolve() == folder.resolve():
        return
    try:
        staging.mkdir()
        for name in _names_of(source):
            shutil.copyfile(source.model.parent / name, staging / name)
            sync(staging / name)
        for name in _names_of(source):
            (staging / name).replace(folder / name)
    except OSError as exc:
        raise BuildError(f"cannot write {folder}: {exc.strerror}") from exc


def _names_of(source: Source) -> list[str]:
    """List an artifact's files, its manifest last."""
    signature = signature_path(source.model)
    files = [file.name for file in source.manifest.files]
    return [*files, *([signature.name] if signature.exists() else []), manifest_path(source.model).name]
