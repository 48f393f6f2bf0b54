"""`pdd export`, and the exports of `pdd adapt`: weights as files for other programs.

`names` and `formats` describe the forms, `run` is the use case.
"""
