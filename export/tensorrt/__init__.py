"""Building TensorRT plans on the device. Needs tensorrt and CUDA bindings at run time; no torch."""
