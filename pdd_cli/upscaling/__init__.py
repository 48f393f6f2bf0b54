"""Upscale images: tiles, sizes, colours, and a pipeline that reads, computes and writes concurrently.

Videos, command lines and the computation of models belong elsewhere.
"""
