"""Image files: the only decoder of the project (OpenCV, EXIF orientation applied)."""

from __future__ import annotations

import re
from collections import Counter
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
        raise DataError(f"{path} does not exist; give an image file") from None
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}") from exc
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str, *, reduced: bool = False) -> UInt8Array:
    """Decode the bytes of an image file, as `read_image` does.

    Args:
        data: the bytes.
        name: the file's name, for messages.
        reduced: decode at one eighth of the size, to check an image quickly.

    Raises:
        DataError: the bytes are empty, not an image, or cut off.
    """
    import cv2

    if not data:
        raise DataError(f"{name} is empty; copy it again or leave it out")
    is_jpeg, is_png = data.startswith(b"\xff\xd8"), data.startswith(b"\x89PNG")
    if (is_jpeg and not _jpeg_is_whole(data)) or (is_png and not _png_is_whole(data)):
        # OpenCV silently fills the missing part of a truncated file with grey.
        raise DataError(f"{name} is cut off after {len(data)} bytes; copy it again or leave it out")
    encoded = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_REDUCED_COLOR_8) if reduced else None
    except cv2.error:  # the image has fewer pixels than the reduction
        image = None
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if image is None else image
    except cv2.error as exc:
        raise DataError(f"{name} cannot be decoded as an image: {one_line(exc)}") from exc
    if image is None:
        raise DataError(
            f"{name} is not an image that OpenCV can decode ({len(data)} bytes); convert it or leave it out"
        )
    return cast(UInt8Array, image)


def _jpeg_is_whole(data: bytes) -> bool:
    """Walk the segments of a JPEG to its end-of-image marker; later bytes (camera trailers) do not matter."""
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
    """Walk the chunks of a PNG (length, type, data, CRC) to the end of IEND; later bytes do not matter."""
    position = 8
    while position + 12 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        position += 12 + length
        if kind == b"IEND":
            return position <= len(data)
    return False


def image_files(path: str | Path) -> list[Path]:
    """List the image files below a folder in sorted order, or return a single file as a list. Raises `DataError`."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist; give an image file or a folder of images")
    images, _ = list_images(path)
    if not images:
        raise DataError(f"{path} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return images


def list_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """List the image files below a folder in sorted order, and count the other files by lower-case suffix.

    Hidden files, such as ``._photo.jpg`` from macOS, are left out.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    for file in folder.rglob("*"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts) and file.is_file():
            if file.suffix.lower() in IMAGE_SUFFIXES:
                images.append(file)
            else:
                others[file.suffix.lower()] += 1
    return sorted(images), others
