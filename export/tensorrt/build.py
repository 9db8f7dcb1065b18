"""Building a TensorRT plan from an ONNX artifact, on the device that will run it.

    edgefg build runs/x/tensorrt-int8/model.onnx --to tensorrt

Writes ``engine.plan``, ``engine.json`` and ``engine.golden.npz`` beside the ONNX file. Keep the ONNX file: a later
driver or JetPack needs a new plan. Runs on devices: no torch.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgefg.artifact import golden
from edgefg.artifact.folder import folder_beside, move_in, remove_stale
from edgefg.artifact.hashes import FileInfo, file_info
from edgefg.artifact.manifest import PlanInfo, encode_manifest, manifest_path, read_manifest
from edgefg.artifact.plan import PLAN, GpuInfo, gpu_number, mismatch
from edgefg.artifact.signature import verify_signature
from edgefg.errors import BuildError, DataError, EdgefgError, one_line
from edgefg.evaluation.package import Draft, stage
from edgefg.evaluation.verify import VerifyReport, verify
from edgefg.export.tensorrt.builder import build_plan, cached_plan, describe, keep_plan
from edgefg.export.tensorrt.fastest import select_fastest
from edgefg.export.tensorrt.sources import (
    BuildPrecision,
    Source,
    copy_source,
    folder_for,
    keep_other_artifacts,
    read_sources,
)
from edgefg.export.tensorrt.worker import BuildConfig, BuildDevice
from edgefg.files import locked, sync
from edgefg.log import get_logger

_log = get_logger(__name__)
_TEGRA = Path("/etc/nv_tegra_release")
"""Only a Jetson has it."""


class BuiltModel(msgspec.Struct, frozen=True):
    """A model that was given, and the speed of its plan."""

    model: str
    precision: str
    p50_ms: float | None = None
    """Median of `Classifier.predict` on the golden frames; None if there was nothing to compare it with."""
    problem: str = ""
    """Why it could not be taken."""


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `build_engine`."""

    plan: str
    kept: bool
    """Whether an earlier plan fits this device and was kept."""
    precision: str
    gpu: str
    tensorrt: str
    candidates: tuple[BuiltModel, ...]
    verified: VerifyReport

    def render(self) -> str:
        """Return the report as text for people."""
        lines = [f"{self.plan}: {self.precision}, for {self.gpu} and TensorRT {self.tensorrt}"]
        if self.kept:
            lines[0] += "; it was there already and fits this device (--rebuild builds it again)"
        for candidate in self.candidates:
            speed = "" if candidate.p50_ms is None else f", p50 {candidate.p50_ms:.3f} ms"
            problem = f": not taken, {candidate.problem}" if candidate.problem else ""
            lines.append(f"  {candidate.precision} of {candidate.model}{speed}{problem}")
        return "\n".join([*lines, self.verified.render()])


class _Context(NamedTuple):
    """The device, and how plans are built on it."""

    here: BuildDevice
    settings: BuildConfig
    among: tuple[str, ...]
    """SHA-256 of the models, if the fastest of several is selected."""
    trusted_key: Path | None
    use_cache: bool


def build_engine(
    models: Sequence[Path],
    *,
    out: Path | None = None,
    precision: BuildPrecision = "auto",
    settings: BuildConfig | None = None,
    rebuild: bool = False,
    trusted_key: Path | None = None,
) -> BuildReport:
    """Build the plan of an ONNX artifact for this device and verify it.

    The GPU is the first one that CUDA_VISIBLE_DEVICES shows.

    Args:
        models: the ONNX files of one or more artifacts of the same network, for instance INT8 and FP16.
        out: folder for the plan; None is the first model's. The ONNX artifact that was taken is copied along.
        precision: which of the models to build; ``auto`` builds all of them and keeps the one that runs fastest here.
        settings: see `BuildConfig`.
        rebuild: build even if there is a plan that fits this device, and take none from the cache.
        trusted_key: PEM file of an Ed25519 public key, by which the ONNX artifacts must be signed (`edgefg sign`).

    Raises:
        DataError: no model of that precision, models of different networks, or unsupported settings.
        ManifestError, IntegrityError: an ONNX artifact cannot be trusted.
        RuntimeUnavailableError: TensorRT, CUDA's bindings or a GPU are missing.
        BuildError: TensorRT could not build any of them; what was there before stays.
    """
    settings = settings or BuildConfig()
    if settings.hardware_compatible != "none" and _TEGRA.exists():
        raise DataError(
            f"--hardware-compatible {settings.hardware_compatible}: TensorRT has no such plans on a Jetson; build one"
            " for each type"
        )
    sources = read_sources(models, precision, trusted_key)
    folder = folder_for(sources, out)
    among = tuple(sorted(source.file.sha256 for source in sources)) if len(sources) > 1 else ()
    context = _Context(describe(), settings, among, trusted_key, not rebuild)
    with _alone_in(folder):
        keep_other_artifacts(sources, folder)
        if not rebuild:
            kept = _still_good(folder / PLAN, sources, context)
            if kept is not None:
                return kept
        with folder_beside(folder / PLAN) as staging:
            staged, candidates = _build_all(sources, staging, context)
            winner, measured = _fastest(staged, candidates)
            if among and (len(staged) == 1 or measured[winner].p50_ms is not None):
                _record_rivals(staged[winner], among)
            copy_source(sources[winner], folder, staging / "source")
            plan = move_in(staged[winner], folder)
        _log.info("verifying")
        return _report(plan, False, measured, context)


def rebuild(plan: Path, device: str | None = None) -> None:
    """Build a plan again for this device, from the ONNX file beside it and with the settings in its manifest.

    This repairs a plan that `edgefg.Classifier` refuses with `DeviceMismatchError`, or with `IntegrityError` after a
    power cut left files of two builds. A plan that fits this device and is whole stays as it is. The new plan carries
    no signature.

    Args:
        plan: the plan file.
        device: the engine's device, as `edgefg.Classifier` takes it; only the first GPU can build.

    Raises:
        BuildError: the ONNX file is not there or is another one, or TensorRT failed.
    """
    info = read_manifest(plan).plan
    if info is None or info.source is None or plan.name != PLAN:
        raise BuildError(f"{plan} does not say what it was built from; build it with `edgefg build MODEL.onnx`")
    source = plan.with_name(info.source.name)
    if not source.exists() or file_info(source) != info.source:
        raise BuildError(f"{source} is not the file that {plan.name} was built from; copy the artifact again")
    if gpu_number(device, plan):
        raise BuildError(f"a plan is built on the first GPU, not on {device}; choose it by CUDA_VISIBLE_DEVICES")
    compatible = "none" if _TEGRA.exists() else info.hardware_compatible
    settings = BuildConfig(
        batches=info.batches,
        hardware_compatible=compatible,
        optimization_level=info.optimization_level,
        workspace=info.workspace,
    )
    build_engine([source], settings=settings)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make the folder and be the only build in it: a service and a person may start one at the same time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise BuildError(f"cannot make the folder {folder}: {exc.strerror}") from exc
    with locked(folder, lambda: _log.info("waiting for another build in %s", folder)):
        remove_stale(folder / PLAN)
        yield


def _still_good(plan: Path, sources: list[Source], context: _Context) -> BuildReport | None:
    """Return the report of an existing plan that fits this device and verifies; None if one has to be built."""
    if not plan.exists():
        return None
    try:
        if context.trusted_key is not None:
            # Only the ONNX file was proven so far. One that this device built carries no signature: it is taken from
            # the cache again.
            verify_signature(plan, context.trusted_key)
        info = read_manifest(plan).plan
        if info is None or info.source not in [source.file for source in sources]:
            _log.info("%s was built from another file", plan)
        elif not _same_build(info, context):
            _log.info("%s was built for another device, by another TensorRT or with other settings", plan)
        elif context.among and info.among != context.among:
            _log.info("%s was not compared with all of these models", plan)
        else:
            return _report(plan, True, (), context)
    except EdgefgError as exc:
        _log.warning("%s does not hold: %s", plan, one_line(exc))
    return None


def _same_build(info: PlanInfo, context: _Context) -> bool:
    here, settings = context.here, context.settings
    device = GpuInfo(here.gpu, here.compute_capability, here.memory)
    asked = info.batches, info.hardware_compatible, info.optimization_level, info.workspace
    return mismatch(info, None, device, here.tensorrt) is None and asked == (
        *(settings.batches, settings.hardware_compatible, settings.optimization_level, settings.workspace),
    )


def _build_all(sources: list[Source], staging: Path, context: _Context) -> tuple[dict[int, Path], list[BuiltModel]]:
    """Build and prove the plan of every source in a folder of its own; one that fails leaves room for the others."""
    staged: dict[int, Path] = {}
    candidates = []
    failure: EdgefgError | None = None
    for number, source in enumerate(sources):
        folder = staging / str(number)
        folder.mkdir()
        problem = ""
        try:
            if number:  # proving the one before took memory
                context = context._replace(here=describe())
            staged[number] = _build_one(source, folder, context)
        except EdgefgError as exc:
            failure, problem = exc, one_line(exc)
            _log.warning("%s gives no plan: %s", source.model, problem)
        candidates.append(BuiltModel(str(source.model), source.manifest.precision, problem=problem))
    if not staged:
        assert failure is not None
        raise failure if isinstance(failure, BuildError) else BuildError(one_line(failure)) from failure
    return staged, candidates


def _build_one(source: Source, folder: Path, context: _Context) -> Path:
    model, manifest = source
    assert manifest.golden is not None
    proof = golden.read(model.with_name(manifest.golden.file))
    here = context.here
    draft = Draft(
        labels=manifest.labels,
        taxonomy=manifest.taxonomy,
        input=manifest.input,
        output=manifest.output,
        precision=manifest.precision,
        weight_bits=manifest.weight_bits,
        provenance=manifest.provenance,
        frames=proof.frames,
        parent_logits=proof.parent_logits,
        plan=_info(source.file, context),
    )
    kept = cached_plan(source.file, manifest.precision, context.settings, here)
    if context.use_cache and kept is not None and kept.exists():
        try:
            _log.info("taking the plan of an earlier build from %s", kept.parent)
            return stage(folder, draft, lambda target: Path(shutil.copyfile(kept, target / PLAN)))
        except (EdgefgError, OSError) as exc:
            _log.warning("it does not hold: %s", one_line(exc))
            for left in folder.iterdir():
                left.unlink()

    def write(target: Path) -> Path:
        build_plan(model, target / PLAN, manifest.precision, context.settings, here)
        return target / PLAN

    plan = stage(folder, draft, write)
    keep_plan(plan, kept)
    return plan


def _info(source: FileInfo, context: _Context) -> PlanInfo:
    here, settings = context.here, context.settings
    return PlanInfo(
        gpu=here.gpu,
        compute_capability=here.compute_capability,
        tensorrt=here.tensorrt,
        hardware_compatible=settings.hardware_compatible,
        batches=settings.batches,
        optimization_level=settings.optimization_level,
        workspace=settings.workspace,
        source=source,
    )


def _fastest(staged: dict[int, Path], candidates: list[BuiltModel]) -> tuple[int, tuple[BuiltModel, ...]]:
    """Measure the plans, if there are several, and return the number of the one to take."""
    first = next(iter(staged))
    if len(staged) == 1:
        return first, tuple(candidates)
    _log.info("measuring %d plans", len(staged))
    try:
        winner, times = select_fastest(staged)
    except EdgefgError as exc:  # all are proven: one without figures is better than none
        _log.warning("they cannot be measured, the first one is taken: %s", one_line(exc))
        return first, tuple(candidates)
    for number, p50 in times.items():
        candidates[number] = msgspec.structs.replace(candidates[number], p50_ms=p50)
    return winner, tuple(candidates)


def _record_rivals(plan: Path, among: tuple[str, ...]) -> None:
    """Note in a staged plan's manifest what it was compared with: the next call with the same models keeps it."""
    manifest = read_manifest(plan)
    assert manifest.plan is not None
    info = msgspec.structs.replace(manifest.plan, among=among)
    manifest_path(plan).write_bytes(encode_manifest(msgspec.structs.replace(manifest, plan=info)))
    sync(manifest_path(plan))


def _report(plan: Path, kept: bool, candidates: tuple[BuiltModel, ...], context: _Context) -> BuildReport:
    return BuildReport(
        plan=str(plan),
        kept=kept,
        precision=read_manifest(plan).precision,
        gpu=context.here.gpu,
        tensorrt=context.here.tensorrt,
        candidates=candidates,
        verified=verify(plan),
    )
