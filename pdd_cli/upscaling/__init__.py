"""Upscaling of one image: tiles, sizes, colours, and reading, computing and writing at once.

Nothing here knows videos, command lines or how a model is computed.
"""
