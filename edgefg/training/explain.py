"""Where a network looks, drawn: the picture with the parts it finds, and its attention maps as heat over the picture.

Maps and boxes are of what the network sees, the crop of `edgefg.preprocess`; here they are laid back over the whole
picture, and what the network does not see is darkened.
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
_LONGEST = 1024  # a larger picture is shrunk to this, unless it would become narrower than _WIDTH
_LIMIT = 4096  # of a very long and narrow one
_HEAT = 0.6  # greatest opacity
_HOTTEST = 225  # level of the colour map; beyond it becomes a dark brown
_DARK = 0.35  # brightness of what the network does not see
_COLOURS = ((255, 209, 0), (0, 214, 255), (255, 99, 204), (130, 255, 90), (255, 150, 60), (180, 160, 255))


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one image."""

    image: str
    picture: str | None = None
    """The PNG that was written."""
    top: tuple[ClassProbability, ...] = ()
    """The most probable classes, best first."""
    boxes: dict[str, tuple[float, float, float, float]] = {}
    """Part → x0, y0, x1, y1 in pixels of the image as decoded; parts that were not found are left out."""
    error: str | None = None
    """Why the image cannot be read."""


class Look(NamedTuple):
    """What a network makes of one frame."""

    logits: FloatArray
    """``float32 [classes]``."""
    maps: list[tuple[str, FloatArray]]
    """Names and maps, ``float32 [h, w]`` from 0 to 1, of what the network sees; the most telling first."""
    boxes: dict[str, FloatArray]
    """Part → ``float32 [4]``: x0, y0, x1, y1 in pixels of the frame."""


def explain_files(checkpoint: Path, files: Sequence[Path], out: Path, top: int = 3) -> Iterator[Explained]:
    """Explain image files one by one, each by a PNG in ``out``; an unreadable one is reported and left out.

    Args:
        checkpoint: a ``.safetensors`` file that edgefg wrote.
        files: images; no two PNGs share a name, whatever folders the images lie in.
        out: folder, created where it is not there.
        top: how many classes are named, and how many of several maps are shown beside their mean.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DataError: a PNG cannot be written.
    """
    network, header = load(checkpoint)
    for file, name in zip(files, file_names(files), strict=True):
        try:
            frame = read_image(file)
        except DataError as exc:
            yield Explained(image=str(file), error=str(exc))
            continue
        seen = look(network, frame, header.input, top)
        if not np.isfinite(seen.logits).all():
            raise CheckpointError(f"{checkpoint} gives logits that are not finite for {file}; train it again")
        best = _best(seen.logits, header.labels, top)
        write_png(out / name, draw(frame, seen, header.input, best))
        boxes = {part: tuple(box.tolist()) for part, box in seen.boxes.items()}
        yield Explained(image=str(file), picture=str(out / name), top=best, boxes=boxes)


def file_names(files: Sequence[Path]) -> list[str]:
    """Name a PNG for each image: the image's own name, with as many of its folders before it as make it unique."""
    taken: set[str] = set()
    names: list[str] = []
    for file in files:
        parts = file.absolute().parts[1:]
        offered = ["-".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
        offered += [f"{len(names)}-{parts[-1]}"]
        # Some file systems do not tell upper case from lower.
        name = next(name for name in offered if name.lower() not in taken)
        taken.add(name.lower())
        names.append(f"{name}.png")
    return names


def look(network: Network, frame: UInt8Array, spec: InputSpec, top: int) -> Look:
    """Let a network, in evaluation mode, look at a frame, ``uint8 [H, W, 3]`` BGR; see `explain_files` for ``top``."""
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
    return Look(logits, _chosen(attention, top), boxes)


def draw(frame: UInt8Array, seen: Look, spec: InputSpec, best: Sequence[ClassProbability]) -> UInt8Array:
    """Draw the picture with its boxes and, to its right, one heat map after the other; ``uint8 [H, W, 3]`` BGR."""
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
    panels = [ground, *(_heated(ground, region, found) for _, found in seen.maps)]
    titles = ["picture", *(name for name, _ in seen.maps)]
    named = [f"{candidate.label}  {candidate.confidence:.1%}" for candidate in best]
    return _compose(panels, titles, named, {name: box * scale for name, box in seen.boxes.items()})


def write_png(path: Path, image: UInt8Array) -> None:
    """Write a PNG, whole or not at all. Raises `DataError` where it cannot be written."""
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
    """Name the maps to show: the only one, or the mean and the strongest few."""
    if attention.maps is None:
        return []
    maps = attention.maps[0].detach().float().cpu().numpy()
    if len(maps) == 1:
        return [("attention", maps[0])]
    strength = maps.mean(axis=(1, 2)) if attention.strength is None else attention.strength[0].detach().cpu().numpy()
    order = 1 + np.argsort(-strength[1:], kind="stable")[:top]
    return [("mean of the maps", maps[0]), *((f"map {i}", maps[i]) for i in order.tolist())]


def _heated(picture: UInt8Array, region: tuple[slice, slice], found: FloatArray) -> UInt8Array:
    """Lay a map, ``float32 [h, w]`` from 0 to 1, over a region: the higher, the redder and the less see-through."""
    # Grey beneath, so that every colour is heat.
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    part = grey[region].astype(np.float32)
    # Linear, half a cell in: as `torch.nn.functional.interpolate` does without aligned corners.
    heat = cv2.resize(found, (part.shape[1], part.shape[0]), interpolation=cv2.INTER_LINEAR).clip(0, 1)
    colour = cv2.applyColorMap((heat * _HOTTEST).round().astype(np.uint8), cv2.COLORMAP_TURBO).astype(np.float32)
    opacity = (_HEAT * np.sqrt(heat))[..., np.newaxis]
    heated = np.asarray(grey, np.uint8)
    heated[region] = (part * (1 - opacity) + colour * opacity).round().astype(np.uint8)
    return heated


def _compose(
    panels: Sequence[UInt8Array], titles: Sequence[str], named: Sequence[str], boxes: dict[str, FloatArray]
) -> UInt8Array:
    """Put panels of one size side by side, titles above and the named classes below; boxes go on the first."""
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
