"""Frames from files and folders: the one decoder of the whole project (OpenCV, EXIF orientation applied)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np

from edgefg.errors import DataError, one_line
from edgefg.preprocess import UInt8Array

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})

_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
_STANDALONE_END = 0xD9


def read_image(path: str | Path) -> UInt8Array:
    """Decode an image file.

    Returns:
        ``uint8 [H, W, 3]``, BGR, EXIF orientation applied; grey images have three equal channels.

    Raises:
        DataError: the file is missing, empty, not an image, or cut off.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is not there; needed an image file") from None
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}") from exc
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str, *, reduced: bool = False) -> UInt8Array:
    """Decode an encoded image; ``name`` is for messages. ``reduced`` decodes at an eighth, to check quickly.

    Raises `DataError` for what `read_image` does.
    """
    import cv2

    if not data:
        raise DataError(f"{name} is empty; needed an image file")
    is_jpeg, is_png = data.startswith(b"\xff\xd8"), data.startswith(b"\x89PNG")
    if (is_jpeg and not _jpeg_is_whole(data)) or (is_png and not _png_is_whole(data)):
        # OpenCV fills what is missing of a cut-off file with grey and says nothing.
        raise DataError(f"{name} is cut off after {len(data)} bytes; copy it again or leave it out")
    encoded = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_REDUCED_COLOR_8) if reduced else None
    except cv2.error:  # an image of fewer pixels than the reduction
        image = None
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if image is None else image
    except cv2.error as exc:
        raise DataError(f"{name} cannot be decoded as an image: {one_line(exc)}") from exc
    if image is None:
        raise DataError(f"{name} is not an image that OpenCV decodes ({len(data)} bytes); convert it or leave it out")
    return cast(UInt8Array, image)


def _jpeg_is_whole(data: bytes) -> bool:
    """Walk a JPEG's segments up to its end-of-image marker; bytes after that (camera trailers) do not matter."""
    position = 2
    while match := _MARKER.search(data, position):
        marker, position = match[1][0], match.end()
        if marker == _STANDALONE_END:
            return True
        if marker == 0x01:
            continue
        position += int.from_bytes(data[position : position + 2], "big")
    return False


def _png_is_whole(data: bytes) -> bool:
    """Walk a PNG's chunks (length, type, data, CRC) up to the end of its IEND; bytes after that do not matter."""
    position = 8
    while position + 12 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        position += 12 + length
        if kind == b"IEND":
            return position <= len(data)
    return False


def image_files(path: str | Path) -> list[Path]:
    """List the image files below a folder in sorted order, or return a file as a list of one. Raises `DataError`."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} is not there; needed an image file or a folder of images")
    files = sorted(file for file in _visible_files(path) if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def unread_files(folder: Path) -> Counter[str]:
    """Count the files below a folder that are no image files to `image_files`, by lower-case suffix."""
    return Counter(file.suffix.lower() for file in _visible_files(folder) if file.suffix.lower() not in IMAGE_SUFFIXES)


def _visible_files(folder: Path) -> Iterator[Path]:
    """List the files below a folder but the hidden ones: macOS leaves ._photo.jpg about."""
    for file in folder.rglob("*"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts) and file.is_file():
            yield file


def read_frames(paths: list[Path]) -> Iterator[tuple[Path, UInt8Array]]:
    """Decode files one after the other."""
    for path in paths:
        yield path, read_image(path)
