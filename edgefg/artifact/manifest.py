"""The artifact contract: the JSON beside a model file that holds everything a device needs to know about it.

``model.xml`` + ``model.bin`` + ``model.json``; ``model.onnx`` + ``model.json``; ``engine.plan`` + ``engine.json``. The
model file stays plain, so that vendors' tools open it. Sizes and SHA-256 sums are checked before a byte of the model
reaches a vendor's deserialiser.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgefg.artifact.quality import Accuracy as Accuracy  # whose place is the manifest
from edgefg.artifact.quality import Comparison, TemperatureScaling
from edgefg.data.split import SplitSpec
from edgefg.errors import IntegrityError, ManifestError
from edgefg.preprocess import InputSpec

SCHEMA = 1

_Name = Annotated[str, msgspec.Meta(pattern=r"^[^/\\\x00]+$", max_length=255)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Batch = Annotated[int, msgspec.Meta(ge=1)]
Batches = tuple[_Batch, _Batch, _Batch]
"""Smallest, usual and greatest batch of a TensorRT optimisation profile."""
HardwareCompatible = Literal["none", "ampere-plus", "same-capability"]
"""On which other GPUs a plan runs: none, all since Ampere, or all of the same compute capability."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of the manifest's structs: frozen, closed, defaults left out of the JSON."""


class OutputSpec(_Part, frozen=True, kw_only=True):
    """What the network gives, ``float32 [N, classes]`` logits, and how they become a decision."""

    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Probabilities are softmax(logits / temperature) (Guo et al. 2017)."""
    reject_threshold: _Share | None = None
    """A prediction whose confidence is lower is marked as rejected."""
    reject_risk: _Share | None = None
    """The share of errors among accepted predictions that the threshold was set for."""


class TaxonomyLevel(_Part, frozen=True, kw_only=True):
    """One coarser level above the classes: for every label the name of its group."""

    name: str
    groups: tuple[str, ...]
    """As long as the labels, in their order."""


class RuntimeInfo(_Part, frozen=True, kw_only=True):
    """The inference engine that the artifact was packaged and checked with."""

    name: str
    """For instance ``openvino``."""
    version: str


class FileInfo(_Part, frozen=True, kw_only=True):
    """One file of the artifact."""

    name: _Name
    """A plain file name in the manifest's own folder."""
    size: Annotated[int, msgspec.Meta(ge=0)]
    """Bytes."""
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class GoldenInfo(_Part, frozen=True, kw_only=True):
    """The golden set: frames with what each step made of them, and how far a device may deviate."""

    file: _Name
    frames: Annotated[int, msgspec.Meta(ge=1)]
    input_levels: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Network input: greatest difference in uint8 levels (1 across processor architectures)."""
    logits: Annotated[float, msgspec.Meta(gt=0)]
    """This artifact's own logits: greatest absolute difference."""
    parent_logits: Annotated[float, msgspec.Meta(gt=0)]
    """The FP32 parent's logits: greatest absolute difference."""


class PlanInfo(_Part, frozen=True, kw_only=True):
    """What a TensorRT plan was built for: it runs on no other device, and under no other version of TensorRT."""

    gpu: str
    """Name of the GPU, as its driver gives it."""
    compute_capability: Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+$")]
    """For instance ``8.7``."""
    tensorrt: str
    """Version of TensorRT."""
    hardware_compatible: HardwareCompatible = "none"
    batches: Batches | None = None
    """Of the plan's profile; None where it has the network's own fixed batch, or 1."""
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3
    workspace: int | None = None
    """What a layer was allowed to use at most, MiB, where that was asked for."""
    among: tuple[str, ...] = ()
    """SHA-256 of the ONNX files of whose plans this one was the fastest; empty where there was one."""
    source: FileInfo | None = None
    """The ONNX file, beside the plan, that it was built from; its own manifest holds what a rebuild needs."""


class Provenance(_Part, frozen=True, kw_only=True):
    """Where the artifact comes from."""

    edgefg: str
    """Version of edgefg that wrote it."""
    parent: str
    """SHA-256 of the checkpoint that was exported."""
    teacher: str | None = None
    """SHA-256 of the teacher that the student was distilled from."""
    dataset: str | None = None
    """Fingerprint of the training data."""
    calibration: str | None = None
    """Fingerprint of the calibration images."""
    split: SplitSpec | None = None
    """How data without split folders were split, so that its test images can be told from its training images."""
    recipe: str = ""
    """The stages and their settings, for people."""


class Manifest(_Part, frozen=True, kw_only=True):
    """Everything that a device needs beside the model file."""

    schema: int
    model: _Name
    """The model file's name."""
    labels: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    input: InputSpec
    output: OutputSpec = OutputSpec()
    precision: Literal["fp32", "fp16", "int8", "unknown"]
    """``unknown`` only where a model was opened without a manifest of its own."""
    runtime: RuntimeInfo
    files: Annotated[tuple[FileInfo, ...], msgspec.Meta(min_length=1)]
    golden: GoldenInfo | None = None
    provenance: Provenance
    accuracy: Accuracy | None = None
    temperature_scaling: TemperatureScaling | None = None
    comparison: Comparison | None = None
    """With the checkpoint's own FP32 network, on validation data; plans, which were built elsewhere, have none."""
    taxonomy: tuple[TaxonomyLevel, ...] = ()
    plan: PlanInfo | None = None
    """Of TensorRT plans only."""


class _SchemaOnly(msgspec.Struct):
    schema: int


def manifest_path(model: Path) -> Path:
    """Return where the manifest of a model file lies: beside it, same stem, ``.json``."""
    return model.with_suffix(".json")


def read_manifest(model: Path) -> Manifest:
    """Read and validate the manifest of a model file.

    Raises:
        ManifestError: it is missing, truncated, of a later schema, or inconsistent.
    """
    path = manifest_path(model)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        hint = "" if model.exists() else f", and neither is {model.name}"
        raise ManifestError(
            f"{path} is not there{hint}; needed the manifest that `edgefg export` writes beside the model file"
        ) from None
    except OSError as exc:
        raise ManifestError(f"cannot read the manifest {path}: {exc.strerror}") from exc
    return decode_manifest(data, path, model.name)


def bare_manifest(model: Path, labels: Sequence[str], spec: InputSpec) -> Manifest:
    """Make a manifest, of what the caller says, for a model file that has none; it proves nothing about the file.

    Raises:
        ManifestError: there is a manifest after all, the labels are not distinct names, or the file cannot be read.
    """
    path = manifest_path(model)
    if path.exists():
        raise ManifestError(f"labels were given for {model.name}, but {path} has its own; leave labels and input out")
    # An OpenVINO IR keeps its weights in a file beside it.
    parts = [model, model.with_suffix(".bin")] if model.suffix == ".xml" else [model]
    try:
        files = tuple(file_info(part) for part in parts)
    except OSError as exc:
        raise ManifestError(f"cannot read {exc.filename or model}: {exc.strerror}") from exc
    manifest = Manifest(
        schema=SCHEMA,
        model=model.name,
        labels=tuple(labels),
        input=spec,
        precision="unknown",
        runtime=RuntimeInfo(name="unknown", version="unknown"),
        files=files,
        provenance=Provenance(edgefg="unknown", parent="unknown"),
    )
    if not labels:
        raise ManifestError(f"no labels were given for {model.name}; needed one for each of its logits")
    _check(manifest, model, None)
    return manifest


def decode_manifest(data: bytes, path: Path, model_name: str | None = None) -> Manifest:
    """Decode and validate a manifest's bytes; ``path`` is for messages. Raises `ManifestError`."""
    try:
        schema = msgspec.json.decode(data, type=_SchemaOnly).schema
        if schema > SCHEMA:
            raise ManifestError(
                f"{path} has schema {schema}; this edgefg reads up to {SCHEMA}: upgrade edgefg on this device"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ManifestError(f"{path} is not a whole manifest ({exc}); copy or export the artifact again") from exc
    _check(manifest, path, model_name)
    return manifest


def _check(manifest: Manifest, path: Path, model_name: str | None) -> None:
    problem = None
    names = [file.name for file in manifest.files]
    if manifest.schema < 1:
        problem = f"there never was a schema {manifest.schema}"
    elif len(set(manifest.labels)) != len(manifest.labels):
        problem = "a label stands twice"
    elif any(len(level.groups) != len(manifest.labels) for level in manifest.taxonomy):
        problem = f"a taxonomy level does not have one group for each of the {len(manifest.labels)} labels"
    elif model_name is not None and manifest.model != model_name:
        problem = f"it describes {manifest.model!r}, not {model_name!r}"
    elif manifest.model.endswith(".xml") and manifest.model[:-4] + ".bin" not in names:
        problem = "the weights (.bin) are missing from its list of files"
    elif manifest.model not in names or (manifest.golden and manifest.golden.file not in names):
        problem = "the model or golden file is missing from its list of files"
    elif len(set(names)) != len(names):
        problem = "a file stands twice in its list of files"
    elif {".", ".."} & set(names):
        problem = "a file name is a folder"
    if problem:
        raise ManifestError(f"{path} is inconsistent: {problem}; export the artifact again")


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as indented UTF-8 JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_info(path: Path) -> FileInfo:
    """Describe a file by name, size and SHA-256."""
    return FileInfo(name=path.name, size=path.stat().st_size, sha256=sha256(path))


def check_files(manifest: Manifest, folder: Path) -> None:
    """Compare every file of the artifact with its recorded size and SHA-256.

    Raises:
        IntegrityError: a file is missing, truncated or altered.
    """
    for expected in manifest.files:
        path = folder / expected.name
        try:
            found = file_info(path)
        except FileNotFoundError:
            raise IntegrityError(
                f"{path} is missing: the artifact consists of {', '.join(f.name for f in manifest.files)}"
                " and its manifest; copy it again"
            ) from None
        except OSError as exc:
            raise IntegrityError(f"cannot read {path}: {exc.strerror}") from exc
        if found.size != expected.size:
            raise IntegrityError(
                f"{path} has {found.size} bytes, its manifest says {expected.size}: copy the artifact again"
            )
        if found.sha256 != expected.sha256:
            raise IntegrityError(
                f"{path} has SHA-256 {found.sha256[:12]}…, its manifest says {expected.sha256[:12]}…:"
                " the file was altered; copy the artifact again"
            )
