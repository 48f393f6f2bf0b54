"""What training draws from: images, crops, the degradation of the synthetic domain.

Layouts of published data sets belong here, too.
"""
