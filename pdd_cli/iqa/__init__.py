"""Image quality assessment: metrics, pairs of images, comparisons, data sets.

Scores are computed here and shown by `reporting` and the command.
"""
