"""Verbs that run on the device: doctor, build, predict, verify, inspect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from edgefg.cli.app import command, needs, print_json
from edgefg.cli.options import Count, DeviceOption, Flag, Json, OptionalCount, Threads, TrustedKey
from edgefg.errors import DataError, DeviceMismatchError, IntegrityError, ManifestError
from edgefg.log import get_logger
from edgefg.settings.gate import Gate

_log = get_logger(__name__)


@command
def doctor(*, json: Json = False) -> None:
    """Check what is installed and say how to install the rest.

    It lists the packages of each extra, what opens which artifact, and what fits this machine's GPU. On a Jetson it
    names the JetPack.
    """
    from edgefg.doctor import diagnose, render, this_machine

    report = diagnose(this_machine())
    if json:
        print_json(report)
    else:
        print(render(report))


@command
def build(
    models: list[Path],
    /,
    *,
    to: Literal["tensorrt"] = "tensorrt",
    precision: Literal["auto", "int8", "fp16", "fp32"] = "auto",
    out: Path | None = None,
    batch: Count = 1,
    max_batch: OptionalCount = None,
    hardware_compatible: Literal["none", "ampere-plus", "same-capability"] = "none",
    workspace: OptionalCount = None,
    optimization_level: int = 3,
    rebuild: Flag = False,
    trusted_key: TrustedKey = None,
    json: Json = False,
) -> None:
    """Build and verify an engine for this device.

    Writes engine.plan beside the ONNX model. If a plan is already there, fits this device and reproduces its golden
    set, nothing is built, so a service may call this at every start.

    Args:
        models: ONNX models of `edgefg export --to tensorrt-onnx`. Of several precisions of one network, the one that
            is fastest here is kept.
        to: The engine: tensorrt, for NVIDIA GPUs and Jetson.
        precision: Build only the models of this precision.
        out: Folder for the plan, if not that of the model. The ONNX artifact is copied there.
        batch: Usual batch size of a network that was exported with a dynamic batch.
        max_batch: Largest batch size of such a network. Default: the usual one.
        hardware_compatible: Other GPUs that the plan must run on. It is slower than a plan for this GPU only.
        workspace: Memory that a layer may use while it runs, in MiB. Default: three quarters of the free memory.
        optimization_level: From 0, which builds fastest, to 5, which searches longest.
        rebuild: Build even if the plan fits, without the cache.
    """
    from edgefg.export.tensorrt.build import build_engine
    from edgefg.export.tensorrt.builder import settings_of

    settings = settings_of(batch, max_batch, hardware_compatible, workspace, optimization_level)
    report = build_engine(
        models,
        out=out,
        precision=precision,
        settings=settings,
        rebuild=rebuild,
        trusted_key=trusted_key,
    )
    if json:
        print_json(report)
    else:
        print(report.render())


@command
def predict(
    artifact: Path,
    images: list[Path],
    /,
    *,
    top_k: Count = 3,
    threads: Threads = None,
    device: DeviceOption = None,
    rebuild: Flag = False,
    trusted_key: TrustedKey = None,
    json: Json = False,
) -> None:
    """Classify images with an artifact.

    Unreadable images are reported and skipped; the exit status is then 2. With --json each image is one line.

    Args:
        artifact: The model file. Its manifest lies beside it.
        images: Image files, or folders of them.
        top_k: Number of classes to show.
        rebuild: Rebuild a TensorRT plan that was built for another device, driver or JetPack, or whose files do not
            match after a power cut. It is built from the ONNX file beside it, which takes minutes.
    """
    from edgefg.artifact.plan import source_of
    from edgefg.classifier import Classifier
    from edgefg.image_io import image_files, read_image

    files = [file for path in images for file in image_files(path)]
    unreadable = 0
    if rebuild and trusted_key is not None:
        raise DataError("--rebuild and --trusted-key exclude each other: a plan built on the device is not signed")

    def open_classifier() -> Classifier:
        return Classifier(artifact, threads=threads, device=device, top_k=top_k, trusted_key=trusted_key)

    try:
        opened = open_classifier()
    except (DeviceMismatchError, IntegrityError):
        if not rebuild or source_of(artifact) is None:
            raise
        from edgefg.export import tensorrt

        tensorrt.rebuild(artifact, device)
        opened = open_classifier()
    with opened as classifier:
        for file in files:
            try:
                frame = read_image(file)
            except DataError as exc:
                unreadable += 1
                _log.error("%s", exc)
                if json:
                    print_json({"image": str(file), "error": str(exc)})
                continue
            prediction = classifier.predict(frame)
            if json:
                fields = {name: getattr(prediction, name) for name in prediction.__struct_fields__ if name != "logits"}
                print_json({"image": str(file), **fields, "logits": prediction.logits.tolist()})
                continue
            named = "  ".join(f"{c.label} {c.confidence:.1%}" for c in prediction.top_k)
            print(f"{file}: {'rejected: ' if prediction.rejected else ''}{named}  ({prediction.timings.total:.1f} ms)")
    if unreadable:
        sys.exit(2)


@command
def verify(
    artifact: Path,
    /,
    *,
    parent: Path | None = None,
    data: Path | None = None,
    split: str | None = None,
    gate: Gate = Gate(),
    device: DeviceOption = None,
    json: Json = False,
) -> None:
    """Check that an artifact is complete and reproduces its golden set.

    Compares sizes and SHA-256 sums with the manifest, then runs the golden set step by step. With --parent and --data
    both artifacts are also compared on labelled images. The exit status is 1 if a step does not reproduce or the gate
    fails, and 2 if the artifact cannot be trusted.

    Args:
        artifact: The model file.
        parent: The artifact that it was made from, for instance the FP32 one.
        data: Labelled images for the comparison with the parent.
        split: Split of the data. Default: val.
    """
    from edgefg.evaluation.validation import require_gate
    from edgefg.evaluation.verify import examine

    report = examine(artifact, parent=parent, data=data, split=split, gate=gate, device=device)
    if json:
        print_json(report)
    else:
        print(report.render())
    require_gate(report.failures, report.artifact)


@command
def inspect(path: Path, /, *, json: Json = False) -> None:
    """Show the manifest of an artifact or the header of a checkpoint.

    The files of an artifact are compared with its manifest.

    Args:
        path: A model file or a .safetensors checkpoint.
    """
    import msgspec

    from edgefg.artifact.manifest import check_artifact, read_manifest

    described: msgspec.Struct
    if path.suffix == ".safetensors":
        with needs("train"):
            from edgefg.training.checkpoint import read_header
        described = read_header(path)
    else:
        described = read_manifest(path)
        check_artifact(described, path)
    if json:
        print_json(described)
        return
    _print_fields(described)


def _print_fields(described: Any, indent: str = "") -> None:
    """Print the fields of a manifest or a header; long lists are shortened."""
    from edgefg.artifact.manifest import Comparison, Provenance, TemperatureScaling

    for name in described.__struct_fields__:
        value = getattr(described, name)
        if isinstance(value, Provenance):
            print(f"{name}:")
            _print_fields(value, "  ")
            continue
        if name == "stages" and value:
            text = f"\n{_rendered_stages(value)}"
        elif name == "members":
            text = "".join(f"\n{member.backbone}, {member.method}" for member in value)
        elif isinstance(value, (Comparison, TemperatureScaling)):
            text = value.render()
        else:
            text = _shortened(value)
        print(f"{indent}{name}:", text.replace("\n", f"\n  {indent}"))


def _rendered_stages(stages: Any) -> str:
    """Return the stages of a header, or of a manifest that a later edgefg may have written."""
    from edgefg.artifact.stages import decode_stages, render_stages

    try:
        return render_stages(decode_stages(stages) if isinstance(stages[0], dict) else stages)
    except ManifestError:
        return "\n".join(str(stage) for stage in stages)


def _shortened(value: object) -> str:
    import msgspec

    plain = msgspec.to_builtins(value)
    if isinstance(plain, (list, tuple)) and len(plain) > 8:
        return f"{len(plain)} ({', '.join(str(entry) for entry in plain[:4])}, …)"
    if isinstance(plain, dict) and len(plain) > 8:
        return f"{len(plain)} entries"
    return str(plain)
