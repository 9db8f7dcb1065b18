"""A simulated NVIDIA device: TensorRT 10 and 11, cuda-python and PyCUDA as their documentation states them, strictly.

No code here ships. It was written from the documentation and the real bindings, not from our runtime, so that the two
check each other. It computes with ONNX Runtime; it proves how the API is used, never speed or TensorRT's arithmetic.

- `install.simulated_device`: puts the simulated modules in place, here and for child processes; yields the books.
- `books.Books`: what is alive, what was violated, faults to come; `books.Config`: what is simulated.
- `device`, `memory`, `streams`, `codes`: CUDA's rules; `cuda_runtime`, `pycuda_driver`: the two bindings over them.
- `plan_format`, `tensorrt_*`: TensorRT. `site/`: what a child process imports. `plans`: fixtures of other tests.
- `rig`: a right user; `wrong_uses`: each rule broken once.
"""
