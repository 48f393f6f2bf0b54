"""Training data: images, crops, the degradation of the synthetic domain, and the layouts of published data sets.

Reading and decoding of image files is in `imaging`.
"""
