"""Networks: loading of any super-resolution model, and the ones that pdd trains or measures with.

Nothing here knows files of images or training.
"""
