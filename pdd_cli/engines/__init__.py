"""Engines compute a model: PyTorch (with Triton on GPUs), OpenVINO, and Winograd's algorithm on CPUs.

All give the same result; `select` chooses the fastest one on this machine.
"""
