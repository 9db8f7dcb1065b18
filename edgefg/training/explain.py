"""Pictures that show where a network looks: the image with boxes of parts, and attention maps as heat maps.

Maps and boxes refer to the network's input, a crop by `edgefg.preprocess`. They are drawn on the whole image, which is
darkened outside the crop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from edgefg.decision import ClassProbability
from edgefg.errors import CheckpointError, DataError
from edgefg.files import atomic_file
from edgefg.image_io import read_image
from edgefg.metrics import softmax
from edgefg.preprocess import InputSpec, UInt8Array, crop_box, prepare, resize
from edgefg.training.checkpoint import load
from edgefg.training.models.network import Attention, Network

FloatArray = npt.NDArray[np.float32]

_WIDTH = 448  # pixels, at least
_LONGEST = 1024  # larger images are shrunk to this, unless they would become narrower than _WIDTH
_LIMIT = 4096  # longest side of a very narrow image
_HEAT = 0.6  # greatest opacity
_HOTTEST = 225  # highest level of the colour map that is used; beyond, it is dark brown
_DARK = 0.35  # brightness outside the network's input
_COLOURS = ((255, 209, 0), (0, 214, 255), (255, 99, 204), (130, 255, 90), (255, 150, 60), (180, 160, 255))


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Explanation of one image."""

    image: str
    picture: str | None = None
    """Path of the PNG."""
    top: tuple[ClassProbability, ...] = ()
    """The most probable classes, best first."""
    boxes: dict[str, tuple[float, float, float, float]] = {}
    """Part → x0, y0, x1, y1 in pixels of the decoded image. Parts that were not found are left out."""
    error: str | None = None
    """Why the image could not be read."""


class FrameAttention(NamedTuple):
    """Logits and attention of a network for one frame."""

    logits: FloatArray
    """``float32 [classes]``."""
    maps: list[tuple[str, FloatArray]]
    """Names and maps, ``float32 [h, w]`` in 0…1, of the network's input. The strongest map comes first."""
    boxes: dict[str, FloatArray]
    """Part → ``float32 [4]``: x0, y0, x1, y1 in pixels of the frame."""


def explain_files(checkpoint: Path, files: Sequence[Path], out: Path, top: int = 3) -> Iterator[Explanation]:
    """Explain images with one PNG each in ``out``. An unreadable image has an explanation with ``error``.

    Args:
        checkpoint: a checkpoint of edgefg.
        files: images. The PNGs have different names even if images of several folders have the same.
        out: folder. It is created if it does not exist.
        top: number of classes that are named, and of maps that are shown beside their mean.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DataError: a PNG cannot be written.
    """
    network, header = load(checkpoint)
    for file, name in zip(files, file_names(files), strict=True):
        try:
            frame = read_image(file)
        except DataError as exc:
            yield Explanation(image=str(file), error=str(exc))
            continue
        attention = attend(network, frame, header.input, top)
        if not np.isfinite(attention.logits).all():
            raise CheckpointError(f"{checkpoint} gives logits that are not finite for {file}. Train it again")
        best = _best(attention.logits, header.labels, top)
        write_png(out / name, draw(frame, attention, header.input, best))
        boxes = {part: tuple(box.tolist()) for part, box in attention.boxes.items()}
        yield Explanation(image=str(file), picture=str(out / name), top=best, boxes=boxes)


def file_names(files: Sequence[Path]) -> list[str]:
    """Return the name of a PNG for each image: the image's name, after as many of its folders as make it unique."""
    taken: set[str] = set()
    names: list[str] = []
    for file in files:
        parts = file.absolute().parts[1:]
        offered = ["-".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
        offered += [f"{len(names)}-{parts[-1]}"]
        # Some file systems ignore case.
        name = next(name for name in offered if name.lower() not in taken)
        taken.add(name.lower())
        names.append(f"{name}.png")
    return names


def attend(network: Network, frame: UInt8Array, spec: InputSpec, top: int) -> FrameAttention:
    """Run a network, in evaluation mode, on a frame ``uint8 [H, W, 3]`` BGR. `explain_files` explains ``top``."""
    device = next(network.parameters()).device
    images = torch.from_numpy(prepare(frame, spec))[None].to(device)
    with torch.no_grad():
        logits = network(images)[0].float().cpu().numpy()
    attention = network.attention(images)
    boxes = {}
    if attention.boxes is not None:
        top_edge, left, height, width = crop_box(frame.shape[0], frame.shape[1], spec)
        scale = np.array([width, height, width, height], np.float32)
        shift = np.array([left, top_edge, left, top_edge], np.float32)
        for name, box in zip(attention.names, attention.boxes[0].detach().float().cpu().numpy(), strict=True):
            if not np.isnan(box).any():
                boxes[name] = (box * scale + shift).astype(np.float32)
    return FrameAttention(logits, _chosen(attention, top), boxes)


def draw(frame: UInt8Array, attention: FrameAttention, spec: InputSpec, best: Sequence[ClassProbability]) -> UInt8Array:
    """Draw the image with boxes and, to its right, the heat maps. Returns ``uint8 [H, W, 3]`` BGR."""
    height, width = frame.shape[:2]
    scale = max(min(1.0, _LONGEST / max(height, width)), _WIDTH / width)
    scale = min(scale, _LIMIT / max(height, width))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    enlarged = cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_CUBIC) if scale > 1 else None
    picture = resize(frame, rows, columns) if enlarged is None else np.asarray(enlarged, np.uint8)
    top, left, seen_height, seen_width = (round(v * scale) for v in crop_box(height, width, spec))
    region = (slice(top, top + max(1, seen_height)), slice(left, left + max(1, seen_width)))
    ground = (picture * _DARK).astype(np.uint8)
    ground[region] = picture[region]
    panels = [ground, *(_heated(ground, region, found) for _, found in attention.maps)]
    titles = ["picture", *(name for name, _ in attention.maps)]
    named = [f"{candidate.label}  {candidate.confidence:.1%}" for candidate in best]
    return _compose(panels, titles, named, {name: box * scale for name, box in attention.boxes.items()})


def write_png(path: Path, image: UInt8Array) -> None:
    """Write a PNG atomically. Raises `DataError` if that fails."""
    encoded = cv2.imencode(".png", image)[1]
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(encoded.tobytes())
    except OSError as exc:
        raise DataError(f"cannot write {path}: {exc.strerror}") from exc


def _best(logits: FloatArray, labels: Sequence[str], top: int) -> tuple[ClassProbability, ...]:
    probabilities = softmax(logits)
    order = np.argsort(-logits, kind="stable")[:top].tolist()
    return tuple(ClassProbability(labels[i], i, float(probabilities[i])) for i in order)


def _chosen(attention: Attention, top: int) -> list[tuple[str, FloatArray]]:
    """Return the names and maps to show: the only one, or the mean and the strongest ones."""
    if attention.maps is None:
        return []
    maps = attention.maps[0].detach().float().cpu().numpy()
    if len(maps) == 1:
        return [("attention", maps[0])]
    strength = maps.mean(axis=(1, 2)) if attention.strength is None else attention.strength[0].detach().cpu().numpy()
    order = 1 + np.argsort(-strength[1:], kind="stable")[:top]
    return [("mean of the maps", maps[0]), *((f"map {i}", maps[i]) for i in order.tolist())]


def _heated(picture: UInt8Array, region: tuple[slice, slice], found: FloatArray) -> UInt8Array:
    """Draw a map, ``float32 [h, w]`` in 0…1, over a region. Higher values are redder and more opaque."""
    # On a grey image, every colour belongs to the map.
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    part = grey[region].astype(np.float32)
    # Linear, like `torch.nn.functional.interpolate` without aligned corners.
    heat = cv2.resize(found, (part.shape[1], part.shape[0]), interpolation=cv2.INTER_LINEAR).clip(0, 1)
    colour = cv2.applyColorMap((heat * _HOTTEST).round().astype(np.uint8), cv2.COLORMAP_TURBO).astype(np.float32)
    opacity = (_HEAT * np.sqrt(heat))[..., np.newaxis]
    heated = np.asarray(grey, np.uint8)
    heated[region] = (part * (1 - opacity) + colour * opacity).round().astype(np.uint8)
    return heated


def _compose(
    panels: Sequence[UInt8Array], titles: Sequence[str], named: Sequence[str], boxes: dict[str, FloatArray]
) -> UInt8Array:
    """Join panels of one size, with titles above and class names below. Boxes are drawn on the first panel."""
    height, width = panels[0].shape[:2]
    size = max(13, min(22, width // 26))
    font, gap, line = ImageFont.load_default(size), 8, round(size * 1.5)
    canvas = Image.new("RGB", (len(panels) * (width + gap) - gap, height + line * (1 + len(named))), (24, 26, 30))
    pen = ImageDraw.Draw(canvas)
    for number, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        left = number * (width + gap)
        canvas.paste(Image.fromarray(cv2.cvtColor(panel, cv2.COLOR_BGR2RGB)), (left, line))
        pen.text((left + 4, 2), title, font=font, fill=(200, 205, 210))
    for number, (name, box) in enumerate(boxes.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        x0, x1 = np.clip(box[[0, 2]], 0, width - 1).tolist()
        y0, y1 = (np.clip(box[[1, 3]], 0, height - 1) + line).tolist()
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=max(2, width // 220))
        pen.text((x0 + 5, y0 + 3), name, font=font, fill=colour, stroke_width=2, stroke_fill=(0, 0, 0))
    for number, text in enumerate(named):
        shade = (255, 255, 255) if number == 0 else (170, 175, 180)
        pen.text((4, line + height + 3 + number * line), text, font=font, fill=shade)
    return np.asarray(cv2.cvtColor(np.asarray(canvas), cv2.COLOR_RGB2BGR), np.uint8)
