"""Videos: file to frames, frames to file, and the upscaling of a whole video in parts.

All that knows PyAV belongs here.
"""
