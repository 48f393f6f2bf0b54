"""HTML pages of `pdd evaluate` and `pdd adapt`.

They only show what was computed elsewhere.
"""
