"""Passes over ONNX graphs, and the rules that TensorRT has for them. Needs onnx and ONNX Runtime; no torch."""
