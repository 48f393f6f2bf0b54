"""Still images: file to array and array to file, with everything the file says beside the pixels.

All that knows a file format belongs here.
"""
