"""From a PyTorch network to an ONNX graph, and to a trainable graph of plain operators. Needs torch."""
