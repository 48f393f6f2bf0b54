"""A folder with the frames of a video as images: `--format png` of a video."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdd_cli.errors import InputError
from pdd_cli.files import write_errors, write_text
from pdd_cli.imaging.encode import write_images
from pdd_cli.imaging.image import Array, DecodedImage, ImageStream, from_float, to_float
from pdd_cli.imaging.metadata import Metadata
from pdd_cli.upscaling.jobs import APPEARED, Job, Output, Result
from pdd_cli.video.decode import CONTAINERS, Clip, codec_name_of, describe_streams, is_video, open_container
from pdd_cli.weights.sources import file_sha256

RECORD = ".pdd-frames.json"
"""The record in a finished folder: how it was made, the times of the frames, and their checksums."""

_HDR = (16, 18)  # transfer characteristics of H.273, which a PNG carries as cICP: PQ and HLG


def gives_frames(job: Job) -> bool:
    """Whether the output of a video is a folder of frames."""
    return is_video(job.source) and job.target.suffix.lower() not in CONTAINERS


def frame_metadata(clip: Clip) -> Metadata:
    """The metadata of a frame as an image: the tags of HDR."""
    colours = clip.colours
    return Metadata(cicp=(colours.primaries, colours.transfer, 0, 1) if colours.transfer in _HDR else None)


def other_streams(clip: Clip) -> list[str]:
    """The names of the streams that images can't hold, such as "audio (aac)"."""
    with open_container(clip.path) as container:
        described = describe_streams(container)
        others = [stream for stream in container.streams if stream.index != clip.index]
        return [f"{stream.type} ({codec_name_of(stream, described)})" for stream in others]


def skipped_frames(job: Job, key: str, *, overwrite: bool) -> Result | None:
    """The result if the folder was made with this `key` already, else None.

    Raises InputError if the folder holds anything that pdd did not make: nothing replaces it.
    """
    if not job.target.exists():
        return None
    record = _read_record(job.target)
    files: Mapping[str, str] = record.get("files", {})
    present = {path.name for path in job.target.iterdir()} if job.target.is_dir() else set()
    if record.get("key") == key and not overwrite and present >= set(files):
        return Result(job, "skipped")
    _check_own(job.target)
    return None


def _check_own(folder: Path, hint: str = "Move it away, or name another output.") -> None:
    """Raise InputError if `folder` holds anything that pdd did not make."""
    record = _read_record(folder)
    files: Mapping[str, str] = record.get("files", {})
    expected = [name for name in sorted(files) if (folder / name).is_file()]
    changed = [name for name in expected if file_sha256(folder / name) != files[name]]
    # Listed last: the checksums of many files take time.
    foreign = sorted({path.name for path in folder.iterdir()} - {RECORD, *files}) if folder.is_dir() else []
    if not record or foreign or changed:
        what = f"holds {(foreign + changed)[0]}, which" if foreign + changed else "exists and"
        raise InputError(
            f"{folder} {what} was not made by pdd, or was changed since: it is not replaced",
            hint,
        )


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


class FrameFolder:
    """The frames of a video as images, written into a hidden folder `parts`, which becomes `target` at the end.

    `format`: suffix of the images without the dot. Frames that an interrupted run of the same `key` left are kept.
    """

    def __init__(
        self, parts: Path, target: Path, clip: Clip, key: str, format: str, output: Output, digest: str
    ) -> None:
        self._parts, self._target, self._clip, self._key = parts, target, clip, key
        self._format, self._output = format, output
        self._made = None
        if output.provenance is not None and not output.strip:
            self._made = replace(output.provenance, source_sha256=digest)
        note = parts / "made-by"
        if not note.exists() or note.read_text(encoding="utf-8") != key:
            shutil.rmtree(parts, ignore_errors=True)
            write_text(note, key)
        self.frames = 0
        while self._path(self.frames).exists():
            self.frames += 1

    def _path(self, number: int) -> Path:
        # Numbered from 1, as FFmpeg does.
        return self._parts / f"{number + 1:08d}.{self._format}"

    def add(self, time: int, pixels: Array) -> None:
        """Write the next frame, (H, W, 3) in 0..65535, with 8 bits if the video has no more."""
        if self._clip.bits == 8:
            pixels = from_float(to_float(pixels), 8)
        picture = DecodedImage(pixels)
        stream = ImageStream(picture.spec, [pixels], frame_metadata(self._clip))
        write_images(self._path(self.frames), [stream], encoding=self._output.encoding, provenance=self._made)
        self.frames += 1

    def finish(self) -> None:
        """Each frame is complete when it is added."""

    def publish(self, times: Sequence[int], end: int) -> None:
        """Rename the folder to `target`, with a record of it. A `target` that exists must be one of pdd."""
        clip = self._clip
        files = {self._path(number).name: file_sha256(self._path(number)) for number in range(len(times))}
        record = {
            "key": self._key,
            "made": str(self._made) if self._made else "",
            "source": clip.path.name,
            "frame_rate": str(clip.rate),
            "times": [round(float(time * clip.time_base), 6) for time in (*times, end)],
            "files": files,
        }
        write_text(self._parts / RECORD, json.dumps(record))
        with write_errors(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            old = self._parts.with_suffix(".old")
            replaced = self._target.exists()
            if replaced:  # also if it appeared, or was changed, while the frames were computed
                _check_own(self._target, APPEARED)
            (self._parts / "made-by").unlink()
            if replaced:
                self._target.replace(old)
            self._parts.replace(self._target)
            shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Delete the frames."""
        shutil.rmtree(self._parts, ignore_errors=True)
