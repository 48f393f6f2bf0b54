"""What computes a model: PyTorch, OpenVINO, Winograd's algorithm on CPUs, Triton on GPUs.

Each engine gives the same result; `select` takes the fastest that does on this machine.
"""
