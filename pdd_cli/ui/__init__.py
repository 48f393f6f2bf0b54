"""The window of `pdd ui`: a page in the browser (page), its server (server), and the process that works (worker).

It uses the public Python interface `pdd_cli` only.
"""
