"""Building TensorRT plans on the device. Needs tensorrt and CUDA bindings at run time. No torch."""

from edgefg.export.tensorrt.build import rebuild

__all__ = ["rebuild"]
