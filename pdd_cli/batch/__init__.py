"""From inputs to jobs, and jobs over devices and processes.

Planning of whole runs belongs here; how one image or video is upscaled does not.
"""
