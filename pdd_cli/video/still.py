"""Upscales one frame of a video as an image: `--preview`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from fractions import Fraction

from pdd_cli.imaging.encode import write_images
from pdd_cli.imaging.image import DecodedImage, ImageStream, from_float, to_float
from pdd_cli.upscaling.jobs import Job, Output, Result, check_target, recorded
from pdd_cli.upscaling.manifest import Manifest
from pdd_cli.upscaling.upscaler import Upscaler
from pdd_cli.video.decode import read_clip, read_still
from pdd_cli.video.frames import frame_metadata
from pdd_cli.video.options import VideoOptions


@dataclass(frozen=True)
class Still:
    """A frame of a video, upright; `time` in seconds; `notes`: what its image can't say."""

    picture: DecodedImage
    time: Fraction
    notes: tuple[str, ...]


def open_still(job: Job, upscaler: Upscaler, output: Output, options: VideoOptions) -> Still:
    """The frame that the video of `job` shows at `options.preview`.

    Raises InputError if it shows none then, or if the output's format can't hold the image.
    """
    assert options.preview is not None
    clip = read_clip(job.source, most_pixels=upscaler.most_pixels, options=options)
    pixels, shown_at = read_still(clip, options.preview)
    pixels = clip.part(pixels)
    if clip.bits == 8:
        pixels = from_float(to_float(pixels), 8)
    notes = [f"the frame at {float(shown_at):.3f} s"]
    if clip.aspect not in (0, 1):
        notes.append(f"its pixels are {clip.aspect.numerator}:{clip.aspect.denominator}, not square")
    if clip.interlaced and not clip.deinterlace:
        notes.append("it is interlaced")
    still = Still(DecodedImage(pixels, metadata=frame_metadata(clip)), shown_at, tuple(notes))
    check_target(job, upscaler.output_size(*clip.upright), output)
    return still


def plan_still(job: Job, still: Still, upscaler: Upscaler) -> Result:
    """The expected result of `write_still`."""
    picture = still.picture
    estimate = upscaler.estimate(picture.spec, streamed=False)
    upscaler.check_memory(estimate.memory)
    size = (picture.width, picture.height)
    return Result(
        job,
        "planned",
        "; ".join(still.notes),
        size,
        upscaler.output_size(*size),
        upscaler.tiles(*size),
        estimate.seconds,
        estimate.seconds,
        estimate.memory,
    )


def write_still(
    job: Job,
    still: Still,
    upscaler: Upscaler,
    digest: str,
    key: str,
    output: Output,
    manifest: Manifest | None,
    started: float,
) -> Result:
    """Upscale the frame and write the image. `digest`: SHA-256 of the video."""
    upscaled = upscaler.upscale(still.picture)
    picture = upscaled.picture
    made = None
    if output.provenance is not None and not output.strip:
        how = f"{output.provenance.how}, the frame at {float(still.time):.3f} s"
        made = replace(output.provenance, source_sha256=digest, how=how)
    stream = ImageStream(picture.spec, [picture.interleaved], picture.metadata)
    with recorded(job, key, manifest) as before_rename:
        write_images(job.target, [stream], encoding=output.encoding, provenance=made, before_rename=before_rename)
    source = still.picture
    return Result(
        job,
        "done",
        "; ".join(still.notes),
        (source.width, source.height),
        (picture.width, picture.height),
        upscaled.tiles,
        time.perf_counter() - started,
        upscaled.model_seconds,
    )
