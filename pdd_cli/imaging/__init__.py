"""Still images: read and write files, with all their metadata.

Everything specific to a file format belongs here.
"""
