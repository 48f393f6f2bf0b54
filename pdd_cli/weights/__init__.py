"""Weights files: the catalogue, downloads, formats, and the store of installed weights.

Networks are built and run in `models` and `engines`.
"""
