"""Videos: file to frames, frames to file, and the upscaling of a whole video in parts.

All code that uses PyAV belongs here.
"""
