"""edgefg: fine-grained image classification on edge devices.

    import cv2, edgefg

    classifier = edgefg.Classifier("model.xml")
    print(classifier.predict(cv2.imread("photo.jpg")).label)

Importing this package loads NumPy and msgspec, and no torch, no OpenCV and no inference engine.
"""

from edgefg.classifier import Classifier
from edgefg.decision import Prediction
from edgefg.errors import (
    DeviceMismatchError,
    EdgefgError,
    FrameError,
    IntegrityError,
    ManifestError,
    RuntimeUnavailableError,
)

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "DeviceMismatchError",
    "EdgefgError",
    "FrameError",
    "IntegrityError",
    "ManifestError",
    "Prediction",
    "RuntimeUnavailableError",
    "__version__",
]
