"""Whole runs of `upscale` and `evaluate`: planning of jobs, and their distribution over devices and processes.

How a single image or video is upscaled is in `upscaling` and `video`.
"""
