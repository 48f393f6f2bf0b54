"""The video encoders of FFmpeg: whether they can be used, their pixel formats and their options."""

from __future__ import annotations

import os
from fractions import Fraction

from pdd_cli.errors import InputError
from pdd_cli.system import without_real_time_scheduling
from pdd_cli.video.decode import CONTAINERS, SUBSAMPLINGS, pyav

REORDERING = ("libx264", "libx265")
"""Encoders that may encode frames in another order, by at most 2 frames. Others are told not to."""

PLANAR = {"nv12": "yuv420p", "p010le": "yuv420p10le"}
"""Interleaved pixel formats of hardware encoders, and those with the same samples in planes."""

# The range of rate factors is 0 to 63, not 0 to 51.
_WIDE_RANGE = ("libvpx", "libvpx-vp9", "libsvtav1", "libaom-av1")
_WITH_RATE_FACTOR = ("libx264", "libx265", *_WIDE_RANGE)

# Suggested if an encoder can't be used.
_KNOWN = ("libx264", "libx265", "libsvtav1", "libaom-av1", "libvpx-vp9", "prores_ks", "mpeg4", "mpeg2video", "ffv1")
_HARDWARE = ("nvenc", "qsv", "amf", "videotoolbox")

# Size of the frame with which encoders are tried; hardware has a minimum.
_TRIAL = 256


def standard_of(encoder: str) -> str:
    """FFmpeg's name of the standard that an encoder implements, such as h264."""
    return str(pyav().codec.Codec(encoder, "w").canonical_name)


def default_encoder(suffix: str, *, deep: bool) -> str:
    """FFmpeg's name of the encoder for containers with this suffix; `deep`: for more than 8 bits."""
    if suffix == ".webm":
        return "libsvtav1" if deep else "libvpx-vp9"
    return "libx265" if deep else "libx264"


def pixel_format(encoder: str, bits: int, chroma: tuple[int, int]) -> tuple[str, int, tuple[int, int]]:
    """The encoder's pixel format nearest to these bits and chroma samples, and its bits and chroma.

    Raises InputError if it has none that pdd writes.
    """
    known = {name: (8, (2, 2)) if name == "nv12" else (10, (2, 2)) for name in PLANAR}
    for shape in ((1, 1), (2, 1), (2, 2)):
        for depth in (8, 10, 12):
            known[f"yuv{SUBSAMPLINGS[shape]}p{'' if depth == 8 else f'{depth}le'}"] = (depth, shape)
    offered = [format.name for format in pyav().codec.Codec(encoder, "w").video_formats or ()]
    usable = [name for name in known if name in offered]
    if not usable:
        raise InputError(
            f"the encoder {encoder} takes no pixel format that pdd writes ({', '.join(offered) or 'none'})"
        )

    def distance(name: str) -> tuple[int, int, int, int, bool]:
        depth, shape = known[name]
        lost, more = (max(0, shape[n] - chroma[n]) for n in (0, 1)), (max(0, chroma[n] - shape[n]) for n in (0, 1))
        return max(0, bits - depth), sum(lost), max(0, depth - bits), sum(more), name in PLANAR

    best = min(usable, key=distance)
    return best, *known[best]


def settings(encoder: str, quality: int, rate_factor: int | None, preset: str | None) -> dict[str, str]:
    """The options of an encoder for a `quality` of 1 to 100, or a rate factor, and a preset.

    Raises InputError for a rate factor if the encoder has none.
    """
    # Quality 95 is CRF 17, which is widely used as visually lossless; 80 is about x264's default of 23.
    factor = 15 + 0.36 * (100 - quality)
    if encoder == "libx265":
        factor += 2
    if encoder in _WIDE_RANGE:
        factor *= 63 / 51
    given = round(factor) if rate_factor is None else rate_factor
    options: dict[str, str] = {}
    if encoder in _WITH_RATE_FACTOR:
        plain = rate_factor is not None or encoder in _WIDE_RANGE
        options["crf"] = str(given) if plain else f"{factor:.1f}"
    elif encoder.endswith("_nvenc"):
        options |= {"rc": "vbr", "cq": str(given), "b": "0"}
    elif encoder.endswith("_qsv"):
        options |= {"global_quality": str(given)}
    elif encoder.endswith("_amf"):
        options |= {"rc": "cqp", "qp_i": str(given), "qp_p": str(given)}
    elif rate_factor is not None:
        raise InputError(f"the encoder {encoder} has no --crf", "Use --quality.")
    elif encoder.endswith("_videotoolbox"):
        options |= {"flags": "+qscale", "global_quality": str(118 * quality)}
    elif encoder != "ffv1":
        options |= {"flags": "+qscale", "global_quality": str(round(118 * (1 + (100 - quality) / 5)))}
    if encoder.startswith("libvpx"):
        options |= {"deadline": "good", "cpu-used": "3" if preset is None else preset, "row-mt": "1"}
    elif preset is not None or encoder == "libsvtav1":
        options["preset"] = preset or "6"
    return options


def check_encoder(encoder: str, quality: int, rate_factor: int | None, preset: str | None, suffix: str) -> None:
    """Raise InputError unless the encoder can be opened here with these settings, and `suffix` can hold its output."""
    av = pyav()
    try:
        kind = av.codec.Codec(encoder, "w").type
    except av.codec.codec.UnknownCodecError:
        kind = ""
    if kind != "video":
        what = f"{encoder} encodes {kind}, not video" if kind else f"FFmpeg has no encoder {encoder} here"
        raise InputError(what, f"Use one of {', '.join(_usable())}.")
    options = settings(encoder, quality, rate_factor, preset)
    problem, unused = _try_to_open(encoder, options)
    if problem:
        if preset is not None and not _try_to_open(encoder, settings(encoder, quality, rate_factor, None))[0]:
            raise InputError(
                f"the encoder {encoder} has no preset {preset}", "See its documentation, or omit --preset."
            )
        raise InputError(f"the encoder {encoder} can't be used here: {problem}", f"Use one of {', '.join(_usable())}.")
    if preset is not None and "preset" in unused:
        raise InputError(f"the encoder {encoder} has no --preset", "Leave it out.")
    with av.open(os.devnull, "w", format=CONTAINERS[suffix]) as container:
        if standard_of(encoder) not in container.supported_codecs:
            raise InputError(f"{suffix} can't hold {standard_of(encoder)} ({encoder})", "Use --format mkv.")


def _usable() -> list[str]:
    """The better known encoders that can be opened here."""
    available = pyav().codec.codecs_available
    hardware = [
        name for name in sorted(available) if name.endswith(_HARDWARE) and name.startswith(("h264", "hevc", "av1"))
    ]
    names = [name for name in (*_KNOWN, *hardware) if name in available]
    return [name for name in names if not _try_to_open(name, settings(name, 95, None, None))[0]]


def _try_to_open(encoder: str, options: dict[str, str]) -> tuple[str, frozenset[str]]:
    """Why the encoder can't be opened, or ""; and the options that it doesn't know."""
    av = pyav()
    log = av.logging
    os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 writes its settings to stderr; this leaves errors
    try:
        context = av.codec.CodecContext.create(encoder, "w")
        context.width = context.height = _TRIAL
        context.pix_fmt = pixel_format(encoder, 8, (2, 2))[0]
        context.time_base, context.framerate = Fraction(1, 25), Fraction(25)
        context.options = {**options, **({"x265-params": "log-level=none"} if encoder == "libx265" else {})}
        log.set_level(log.ERROR)
        with log.Capture() as messages, without_real_time_scheduling():
            context.open()
    except InputError as error:
        return error.message, frozenset()
    except (av.error.FFmpegError, ValueError) as error:
        said = [text.strip() for _, _, text in messages if text.strip()]
        return (said[0] if said else str(getattr(error, "strerror", None) or error)), frozenset()
    finally:
        log.set_level(None)
    return "", frozenset(context.options)
