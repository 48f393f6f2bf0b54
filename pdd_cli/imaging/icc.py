"""ICC profiles made from primaries and a transfer curve, for files that describe their colours in another way."""

from __future__ import annotations

import struct

import numpy as np

# CIE 1931 x, y of white, red, green and blue, by the code of the colour primaries in ITU-T H.273.
PRIMARIES = {
    1: (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    7: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
SRGB_PRIMARIES = PRIMARIES[1]
# The sRGB curve: g, a, b, c, d of a parametric curve of type 3 (parametricCurveType of ICC.1).
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def profile(primaries: tuple[float, ...], gamma: float | None, *, gray: bool) -> bytes:
    """An ICC profile, version 4.3.

    Args:
        primaries: CIE 1931 x, y of white, red, green and blue: eight numbers.
        gamma: Exponent of the power curve. None for the sRGB curve.
        gray: Whether the profile is for gray images, which need the curve only.

    Raises:
        ValueError: the primaries span no colours.
    """
    curve = b"para\0\0\0\0" + struct.pack(">HH", 3 if gamma is None else 0, 0)
    curve += _fixed(_SRGB_CURVE if gamma is None else (gamma,))
    tags = {b"desc": _text("as the file says"), b"cprt": _text("none"), b"wtpt": _xyz(_D50)}
    if gray:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), _columns(primaries), strict=True):
            tags[name] = _xyz(column)
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    at = 128 + 4 + 12 * len(tags)
    table, contents = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(contents), len(content))
        contents += content + b"\0" * (-len(content) % 4)
    space = b"GRAY" if gray else b"RGB "
    head = struct.pack(">I4sI4s4s4s", at + len(contents), b"\0" * 4, 0x04300000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _fixed(_D50)
    return head.ljust(128, b"\0") + table + contents


def _columns(primaries: tuple[float, ...]) -> list[tuple[float, ...]]:
    """XYZ of red, green and blue, adapted to D50. Raises ValueError if the primaries span no colours."""
    points = np.array(primaries, float).reshape(4, 2)
    xyz = np.stack([points[:, 0], points[:, 1], 1 - points.sum(axis=1)]) / points[:, 1]
    white, colours = xyz[:, 0], xyz[:, 1:]
    try:
        matrix = colours * np.linalg.solve(colours, white)
    except np.linalg.LinAlgError as error:
        raise ValueError("the primaries span no colours") from error
    adapted = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white)) @ _BRADFORD @ matrix
    if not np.isfinite(adapted).all() or np.abs(adapted).max() > 100:
        raise ValueError("the primaries span no colours")
    return [tuple(column) for column in adapted.T]


def _fixed(values: tuple[float, ...]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">IIHHII", 1, 12, 0x656E, 0x5553, len(encoded), 28) + encoded
