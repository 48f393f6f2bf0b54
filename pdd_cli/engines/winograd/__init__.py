"""3x3 convolutions by Winograd's algorithm F(4x4, 3x3) on CPUs: see README.md.

Kernels are written with llvmlite and compiled for the CPU that runs them.
"""
