"""HTML pages of `pdd evaluate` and `pdd adapt`.

They only present results; scores are computed in `iqa` and `adaptation`.
"""
