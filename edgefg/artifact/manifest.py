"""The manifest: a JSON file beside a model file, with everything that a device needs to know about it.

``model.xml`` + ``model.bin`` + ``model.json``; ``model.onnx`` + ``model.json``; ``engine.plan`` + ``engine.json``. The
model file stays plain, so that vendors' tools open it. Sizes and SHA-256 sums are checked before a byte of the model
reaches a vendor's deserialiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgefg.artifact.hashes import FileInfo, FileName, check_files, file_info
from edgefg.errors import ManifestError
from edgefg.metrics import Scores
from edgefg.preprocess import InputSpec
from edgefg.runtime import model_files
from edgefg.settings.gate import Gate
from edgefg.settings.split import SplitSpec
from edgefg.taxonomy import TaxonomyLevel

SCHEMA = 2
"""2: `Provenance.stages`."""
# Number of classes in `Comparison.render`.
_SHOWN = 5

_Share = Annotated[float, Meta(ge=0, le=1)]
_Batch = Annotated[int, Meta(ge=1)]
Batches = tuple[_Batch, _Batch, _Batch]
"""Smallest, usual and greatest batch of a TensorRT optimisation profile."""
HardwareCompatible = Literal["none", "ampere-plus", "same-capability"]
"""On which other GPUs a plan runs: none, all since Ampere, or all of the same compute capability."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of the manifest's structs: frozen, no unknown fields, defaults omitted from the JSON."""


class OutputSpec(_Part, frozen=True, kw_only=True):
    """How the network's output, ``float32 [N, classes]`` logits, becomes a decision."""

    temperature: Annotated[float, Meta(gt=0)] = 1.0
    """Probabilities are softmax(logits / temperature) (Guo et al. 2017)."""
    reject_threshold: _Share | None = None
    """Predictions of lower confidence are marked as rejected."""
    reject_risk: _Share | None = None
    """Proportion of errors among accepted predictions for which the threshold was set."""


class RuntimeInfo(_Part, frozen=True, kw_only=True):
    """The inference engine that the artifact was packaged and checked with."""

    name: str
    """For instance ``openvino``."""
    version: str


class GoldenInfo(_Part, frozen=True, kw_only=True):
    """The golden set, and how far a device may deviate from it."""

    file: FileName
    frames: Annotated[int, Meta(ge=1)]
    input_levels: Annotated[int, Meta(ge=0)] = 1
    """Network input: greatest difference in uint8 levels (1 across processor architectures)."""
    logits: Annotated[float, Meta(gt=0)]
    """This artifact's own logits: greatest absolute difference."""
    parent_logits: Annotated[float, Meta(gt=0)]
    """The FP32 parent's logits: greatest absolute difference."""


class PlanInfo(_Part, frozen=True, kw_only=True):
    """The device and the TensorRT that a plan was built for: it does not run on any other."""

    gpu: str
    """Name of the GPU, as its driver gives it."""
    compute_capability: Annotated[str, Meta(pattern=r"^\d+\.\d+$")]
    """For instance ``8.7``."""
    tensorrt: str
    """Version of TensorRT."""
    hardware_compatible: HardwareCompatible = "none"
    batches: Batches | None = None
    """Batches of the optimisation profile; None if the network has a fixed batch, or for 1."""
    optimization_level: Annotated[int, Meta(ge=0, le=5)] = 3
    workspace: int | None = None
    """Workspace limit in MiB, if one was given."""
    among: tuple[str, ...] = ()
    """SHA-256 of the ONNX files whose plans were compared; empty if there was only one."""
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
    """How data without split folders were split, so that test and training images can be told apart."""
    stages: tuple[dict[str, Any], ...] = ()
    """The stages that made it, the first one first: records of `edgefg.artifact.stages`, as JSON.

    A device never needs their types, and must not refuse an artifact because of an option that it does not know.
    """
    recipe: str = ""
    """The stages in words; only in files before schema 2, which lack `stages`."""


class Accuracy(_Part, frozen=True, kw_only=True):
    """Accuracy measured through `Classifier`."""

    data: str
    """Split and name of the data set."""
    images: Annotated[int, Meta(ge=1)]
    top1: _Share
    top1_low: _Share
    """Lower end of the 95 % Wilson interval."""
    top1_high: _Share
    balanced: _Share
    """Mean of the per-class recalls."""

    @classmethod
    def of(cls, scores: Scores, data: str) -> Accuracy:
        """Return the scores that a manifest or a checkpoint records; ``data`` names the images."""
        return cls(
            data=data,
            images=scores.images,
            top1=scores.top1,
            top1_low=scores.top1_low,
            top1_high=scores.top1_high,
            balanced=scores.balanced,
        )


class TemperatureScaling(_Part, frozen=True, kw_only=True):
    """Calibration of confidences: the fit of `OutputSpec.temperature` on the artifact's own logits.

    The figures after scaling are cross-validated: each part of the images is scaled with the temperature fitted on all
    others.
    """

    data: str
    """Split and name of the data set that it was fitted on."""
    images: Annotated[int, Meta(ge=1)]
    parts: Annotated[int, Meta(ge=0)]
    """Number of parts of the cross-validation; 0 if nothing was fitted."""
    ece_before: _Share
    """Expected calibration error (15 bins) at a temperature of 1."""
    ece_after: _Share
    """The same with the fitted temperature, cross-validated."""
    nll_before: Annotated[float, Meta(ge=0)]
    """Mean negative log-likelihood of the right class at a temperature of 1, nats."""
    nll_after: Annotated[float, Meta(ge=0)]
    """The same with the fitted temperature, cross-validated."""
    unchanged: str = ""
    """Why the temperature stayed at 1, if it did; then the figures after equal those before."""

    def render(self) -> str:
        """Return it as one line of text for people."""
        on = f"on {self.data} ({self.images} images)"
        if self.unchanged:
            return f"ECE {self.ece_before:.2%}, NLL {self.nll_before:.3f} {on}; temperature left at 1: {self.unchanged}"
        return (
            f"ECE {self.ece_before:.2%} → {self.ece_after:.2%}, NLL {self.nll_before:.3f} → {self.nll_after:.3f} {on},"
            f" cross-validated in {self.parts} parts"
        )


class ClassDrop(_Part, frozen=True, kw_only=True):
    """A class that the artifact recognises less often than its parent."""

    label: str
    images: Annotated[int, Meta(ge=1)]
    """How many images have it as label."""
    parent_recall: _Share
    recall: _Share
    chance: _Share
    """Probability of losing at least as many images by chance, Bonferroni-corrected (`edgefg.evaluation.gate`)."""

    def render(self) -> str:
        """Return it as a few words for people."""
        return f"{self.label}: recall {self.parent_recall:.1%} → {self.recall:.1%} of {self.images} images"


class Flip(_Part, frozen=True, kw_only=True):
    """Images of one class that the parent classifies correctly and the artifact assigns to another."""

    label: str
    """Their class, and the parent's answer."""
    predicted: str
    """The artifact's answer."""
    images: Annotated[int, Meta(ge=1)]

    def render(self) -> str:
        """Return it as a few words for people."""
        return f"{self.label} → {self.predicted} ({self.images})"


class Comparison(_Part, frozen=True, kw_only=True):
    """An artifact and its FP32 parent on the same labelled images."""

    parent: Accuracy
    drop: float
    """Top-1 of the parent minus top-1 of the artifact, in percentage points."""
    drop_low: float
    """Lower end of the 95 % interval of the drop, for paired images (Bonett & Price 2012), percentage points."""
    drop_high: float
    drop_error: Annotated[float, Meta(ge=0)]
    """Standard error of the drop, for paired images, percentage points."""
    lost: Annotated[int, Meta(ge=0)]
    """Images that the parent has right and the artifact wrong: its flips."""
    gained: Annotated[int, Meta(ge=0)]
    """Images that the artifact has right and the parent wrong."""
    mcnemar_p: _Share
    """Probability of a difference at least this large if both were equally accurate (exact McNemar test, two-sided)."""
    agreement: _Share
    """Share of images on which both name the same class, right or wrong."""
    logits: float
    """Greatest absolute difference of a logit."""
    parent_logits_max: float
    """Greatest absolute logit of the parent, to compare with."""
    worst: tuple[ClassDrop, ...]
    """Classes that lose images, worst first: the worst five, and every class whose loss chance does not explain."""
    flips: tuple[Flip, ...]
    """Which class the lost images are taken for, the most frequent pair first; at most five pairs."""
    gate: Gate | None
    """The limits of the gate; None: compared without a gate."""

    def render(self) -> str:
        """Return it as a few lines of text for people."""
        lines = [
            f"drop {self.drop:+.2f} points (95 %: {self.drop_low:+.2f} to {self.drop_high:+.2f}; {self.lost} images"
            f" lost, {self.gained} gained, McNemar p = {self.mcnemar_p:.2g}), top-1 agreement {self.agreement:.2%}",
            f"greatest difference of a logit {self.logits:.3g} (parent's greatest logit: {self.parent_logits_max:.3g})",
            *(f"  {worst.render()}" for worst in self.worst[:_SHOWN]),
        ]
        if self.flips:
            lines.append(f"  flips: {', '.join(flip.render() for flip in self.flips)}")
        return "\n".join(lines)


class Manifest(_Part, frozen=True, kw_only=True):
    """Everything that a device needs in addition to the model file."""

    schema: int
    model: FileName
    """The model file's name."""
    labels: Annotated[tuple[str, ...], Meta(min_length=1)]
    input: InputSpec
    output: OutputSpec = OutputSpec()
    precision: Literal["fp32", "fp16", "int8", "unknown"]
    """``unknown`` only if a model was opened without a manifest."""
    weight_bits: Literal[7, 8] | None = None
    """Width of INT8 weights; None for other precisions, and in manifests of earlier versions."""
    runtime: RuntimeInfo
    files: Annotated[tuple[FileInfo, ...], Meta(min_length=1)]
    golden: GoldenInfo | None = None
    provenance: Provenance
    accuracy: Accuracy | None = None
    temperature_scaling: TemperatureScaling | None = None
    comparison: Comparison | None = None
    """With the FP32 network of the checkpoint, on validation data; plans have none."""
    taxonomy: tuple[TaxonomyLevel, ...] = ()
    plan: PlanInfo | None = None
    """Of TensorRT plans only."""


class _SchemaOnly(msgspec.Struct):
    schema: int


def manifest_path(model: Path) -> Path:
    """Return the path of a model file's manifest: beside it, same stem, ``.json``."""
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
            f"{path} is not there{hint}; copy the manifest, which `edgefg export` writes beside the model file"
        ) from None
    except OSError as exc:
        raise ManifestError(f"cannot read the manifest {path}: {exc.strerror}") from exc
    return decode_manifest(data, path, model.name)


def bare_manifest(model: Path, labels: Sequence[str], spec: InputSpec) -> Manifest:
    """Make the missing manifest of a model file; its hashes are those of the files as found, so nothing is verified.

    Raises:
        ManifestError: there is a manifest, the labels are not distinct, or the file cannot be read.
    """
    path = manifest_path(model)
    if path.exists():
        raise ManifestError(f"labels were given for {model.name}, but {path} has its own; omit labels and input")
    try:
        files = tuple(file_info(file) for file in model_files(model))
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
        raise ManifestError(f"no labels were given for {model.name}; give one for each of its logits")
    _check(manifest, model, None)
    return manifest


def decode_manifest(data: bytes, path: Path, model_name: str | None = None) -> Manifest:
    """Decode and validate a manifest; ``path`` is for messages. Raises `ManifestError`."""
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
        problem = f"schema {manifest.schema} does not exist"
    elif len(set(manifest.labels)) != len(manifest.labels):
        problem = "a label occurs twice"
    elif any(len(level.groups) != len(manifest.labels) for level in manifest.taxonomy):
        problem = f"a taxonomy level does not have one group for each of the {len(manifest.labels)} labels"
    elif model_name is not None and manifest.model != model_name:
        problem = f"it describes {manifest.model!r}, not {model_name!r}"
    elif missing := _missing(manifest, names):
        problem = f"{missing} is missing from its list of files"
    elif len(set(names)) != len(names):
        problem = "a file occurs twice in its list of files"
    elif {".", ".."} & set(names):
        problem = "a file name is a folder"
    if problem:
        raise ManifestError(f"{path} is inconsistent: {problem}; export the artifact again")


def _missing(manifest: Manifest, names: list[str]) -> str | None:
    """Name a file that the artifact needs and that its manifest does not list."""
    needed = [file.name for file in model_files(Path(manifest.model))]
    needed += [manifest.golden.file] if manifest.golden else []
    return next((name for name in needed if name not in names), None)


def check_artifact(manifest: Manifest, model: Path) -> None:
    """Compare the files of an artifact with its manifest.

    Raises:
        IntegrityError: a file is missing, truncated or altered. The message says how to repair the artifact.
    """
    rebuildable = manifest.plan is not None and manifest.plan.source is not None
    remedy = f"build it again: {build_command(model, manifest.plan)}" if rebuildable else "copy the artifact again"
    check_files(manifest.files, model.parent, remedy)


def build_command(plan: Path, info: PlanInfo | None) -> str:
    """Return the command that builds a TensorRT plan again."""
    source = plan.with_name(info.source.name) if info and info.source else "MODEL.onnx"
    return f"edgefg build {source} --to tensorrt"


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as indented UTF-8 JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
