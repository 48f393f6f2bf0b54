"""Weights files: the catalogue, downloads, formats, and the store of installed weights.

Nothing here runs a network.
"""
