"""`pdd export`, and the exports of `pdd adapt`: weights as files for other programs.

`names` and `formats` describe the forms, `onnx_graph` writes the one that needs packages, `run` is the use case.
"""
