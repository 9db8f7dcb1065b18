"""The verbs that use an artifact: predict, verify, bench, inspect."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path

import msgspec
import typer

from edgefg.artifact.manifest import Comparison, TemperatureScaling
from edgefg.artifact.plan import source_of
from edgefg.classifier import Classifier
from edgefg.cli.app import Count, MaybeCount, command, needs, print_json, say
from edgefg.errors import DataError, DeviceMismatchError, IntegrityError
from edgefg.image_io import image_files, read_image
from edgefg.settings.gate import Gate

_GATE = Gate()


class Frame(str, Enum):
    """What `bench` classifies."""

    network = "network"
    camera = "camera"


@command
def predict(
    artifact: Path,
    images: list[Path],
    top_k: Count = 3,
    threads: MaybeCount = None,
    device: str | None = None,
    rebuild: bool = False,
    trusted_key: Path | None = None,
    json: bool = False,
) -> None:
    """Classify images with an artifact. An unreadable image is told; the others are classified all the same.

    Args:
        artifact: the model file; its manifest lies beside it.
        images: image files, or folders of them.
        top_k: how many candidates to show.
        threads: CPU threads of the engine.
        device: the engine's device, for instance GPU with OpenVINO.
        rebuild: if a TensorRT plan was built for another device, driver or JetPack, or if a power cut mixed its files,
            build it again from the ONNX file beside it. This takes minutes.
        trusted_key: PEM file of the public key that must have signed the artifact.
        json: print one JSON object a line.
    """
    files = [file for path in images for file in image_files(path)]
    unreadable = 0
    if rebuild and trusted_key is not None:
        raise DataError("--rebuild excludes --trusted-key, since a plan that a device builds carries no signature")

    def open_classifier() -> Classifier:
        return Classifier(artifact, threads=threads, device=device, top_k=top_k, trusted_key=trusted_key)

    try:
        opened = open_classifier()
    except (DeviceMismatchError, IntegrityError):  # built for another device, or a power cut between two files
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
                print(f"edgefg: {exc}", file=sys.stderr)
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
        raise typer.Exit(2)


@command
def verify(
    artifact: Path,
    parent: Path | None = None,
    data: Path | None = None,
    split: str | None = None,
    gate: Gate = _GATE,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Prove that an artifact is whole and does what it did when it was packaged.

    Checks sizes and SHA-256 sums, and reproduces the golden set step by step. With a parent and data it also compares
    the two on those images. Exit status 1 where something does not reproduce or the gate does not hold, 2 where the
    artifact cannot be trusted.

    Args:
        artifact: the model file.
        parent: the artifact it was made from, for instance the FP32 one.
        data: labelled images to compare both on.
        split: which of their splits; val where left out.
        gate: how much worse than the parent it may be, an option each.
        device: the engine's device, for instance GPU with OpenVINO.
        json: print the report as one JSON object, also where the gate does not hold.
    """
    from edgefg.evaluation.measure import require
    from edgefg.evaluation.verify import examine

    report = examine(artifact, parent=parent, data=data, split=split, gate=gate, device=device)
    if json:
        print_json(report)
    else:
        print(report.render())
    require(report.failures, report.artifact)


@command
def bench(
    artifacts: list[Path],
    data: Path | None = None,
    split: str | None = None,
    iterations: Count = 200,
    warmup: Count = 20,
    rounds: Count = 5,
    workers: Count = 1,
    frame: Frame = Frame.network,
    threads: MaybeCount = None,
    device: str | None = None,
    skip_corrupt: bool = False,
    json: Path | None = None,
) -> None:
    """Measure latency, throughput, memory and cold start of artifacts, side by side in one run.

    Prints a table, then one JSON line.

    Args:
        artifacts: model files; their rounds are interleaved, so that a machine's moods hit all alike.
        data: labelled images; adds accuracy with a 95 % interval.
        split: which of their splits.
        iterations: timed predictions of each artifact.
        warmup: predictions before the timed ones, each round.
        rounds: how many times each artifact's turn comes.
        workers: threads that share one classifier where throughput is measured.
        frame: network (a frame of network size) or camera (1280×720, preprocessing included).
        threads: CPU threads of the engine.
        device: the engine's device.
        skip_corrupt: leave unreadable images out instead of stopping.
        json: also write the report to this file.
    """
    from edgefg.benchmarks.harness import bench as run
    from edgefg.benchmarks.report import render

    report = run(
        artifacts,
        data=data,
        split=split,
        iterations=iterations,
        warmup=warmup,
        rounds=rounds,
        workers=workers,
        threads=threads,
        device=device,
        frame=frame.value,
        skip_corrupt=skip_corrupt,
        progress=say,
    )
    print(render(report))
    print_json(report)
    if json is not None:
        from edgefg.files import atomic_file

        try:
            with atomic_file(json) as temporary:
                temporary.write_bytes(msgspec.json.encode(report) + b"\n")
        except OSError as exc:
            raise DataError(f"cannot write {json}: {exc.strerror}") from exc


@command
def inspect(path: Path, json: bool = False) -> None:
    """Show what an artifact or a checkpoint is: its manifest or header, its files checked.

    Args:
        path: a model file or a .safetensors checkpoint.
        json: print it as one JSON object.
    """
    from edgefg.artifact.manifest import check_artifact, read_manifest

    described: msgspec.Struct
    if path.suffix == ".safetensors":
        try:
            from edgefg.training.checkpoint import read_header
        except ImportError as exc:
            raise needs("train", exc) from exc
        described = read_header(path)
    else:
        described = read_manifest(path)
        check_artifact(described, path)
    if json:
        print_json(described)
        return
    for name in described.__struct_fields__:
        value = msgspec.to_builtins(getattr(described, name))
        if isinstance(measured := getattr(described, name), (Comparison, TemperatureScaling)):
            print(f"{name}:", measured.render().replace("\n", "\n  "))
        elif name == "members" and value:
            print("members:", "; ".join(member["recipe"] for member in value))
        elif isinstance(value, (list, tuple)) and len(value) > 8:
            print(f"{name}: {len(value)} ({', '.join(str(entry) for entry in value[:4])}, …)")
        elif isinstance(value, dict) and len(value) > 8:
            print(f"{name}: {len(value)} entries")
        else:
            print(f"{name}: {value}")


def cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
