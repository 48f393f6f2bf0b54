"""Plans a run: finds the inputs, names the outputs and rejects conflicts."""

from __future__ import annotations

import glob
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pdd_cli.errors import InputError
from pdd_cli.files import is_case_insensitive
from pdd_cli.imaging.decode import probe
from pdd_cli.imaging.find import find_images, is_image
from pdd_cli.imaging.formats import FORMATS, READ_ONLY, format_of, load_plugin
from pdd_cli.imaging.provenance import source_of
from pdd_cli.settings.resolve import DEFAULT_FILE
from pdd_cli.settings.upscale import FormatChoice
from pdd_cli.upscaling.archives import ARCHIVES, is_archive
from pdd_cli.upscaling.jobs import Job
from pdd_cli.upscaling.manifest import NAME, Manifest
from pdd_cli.video.decode import CONTAINERS, check_video_name, is_video
from pdd_cli.weights.sources import file_sha256

_VIDEO_FORMATS = ("mp4", "mov", "mkv", "webm")


@dataclass(frozen=True)
class Plan:
    """The jobs of a run, and the files that are not inputs.

    `others`: the number of files of other kinds, by suffix. `outputs`: outputs of earlier runs, which are skipped if
    their inputs are there as well. `problems`: folders that can't be read.
    """

    jobs: list[Job] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    outputs: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def plan_jobs(
    sources: Sequence[Path],
    output: str,
    *,
    format: FormatChoice,
    suffix: str,
    recursive: bool,
    stills: bool = False,
    as_frames: bool = False,
    listed: bool = False,
) -> Plan:
    """The jobs for files, folders and glob patterns. Folders are listed; files are opened only to recognise outputs.

    One source: the tree of a folder, or of the matches of a pattern, is reproduced below `output`. For a file, `output`
    is the output file, or a folder if it exists as one, ends in a slash or has no suffix. Several sources: `output` is
    a folder for files and matches; the tree of a folder is reproduced in a subfolder with its name. `suffix` is
    appended to each name. `stills`: the inputs are videos and the outputs are images.
    `as_frames`: each folder is one video, whose frames are the images in it. With an image format, the output of a
    video that is named itself is a folder of its frames.
    `listed`: the sources are files and folders from a list. Their tree below the folder that they have in common is
    reproduced, and those that don't exist are problems of the plan.

    Raises InputError if there is nothing to do, two inputs would have the same output, or an output would replace an
    input.
    """
    if output == "-":
        raise InputError("the output -: pdd doesn't write to a pipe", "Give a file or a folder.")
    plan, naming = Plan(), _Naming(format, suffix, stills, as_frames)
    if listed:
        jobs = _jobs_of_list(sources, output, naming, recursive, plan)
    elif len(sources) == 1:
        jobs = _jobs_of(sources[0], output, naming, recursive, plan)
    else:
        if not _is_folder_name(output):
            raise InputError(
                f"{len(sources)} inputs, but the output {output} is a file",
                "Give a folder as the last argument, for example: pdd upscale *.jpg upscaled/",
            )
        folder = f"{output}/"
        jobs = []
        for source in sources:
            below = f"{folder}{source.resolve().name}" if source.is_dir() else folder
            jobs += _jobs_of(source, below, naming, recursive, plan)
        jobs = list({job.source.resolve(): job for job in jobs}.values())  # a file that is named twice is one job
    check_collisions(jobs)
    if format in ("heic", "jxl"):
        load_plugin(FORMATS[f".{format}"])
    return replace(plan, jobs=jobs)


def find_inputs(folder: Path, *, recursive: bool) -> tuple[list[Path], Plan]:
    """The files in a folder that `plan_jobs` would find, and a plan with the others. Raises InputError as it does."""
    plan = Plan()
    return find_images(folder, recursive=recursive, wanted=partial(_is_wanted, plan), problems=plan.problems), plan


def plan_found(
    folder: Path, found: Sequence[Path], output: str, plan: Plan, *, format: FormatChoice, suffix: str
) -> Plan:
    """`plan` with the jobs for the files found in a folder: perhaps none, and some may collide (`collisions`)."""
    return replace(plan, jobs=_jobs_in(folder, found, Path(output), _Naming(format, suffix), plan))


@dataclass(frozen=True)
class _Naming:
    """How outputs are named: see `plan_jobs`."""

    format: FormatChoice
    suffix: str
    stills: bool = False
    as_frames: bool = False
    animations: bool = False

    def gives_video(self, source: Path) -> bool:
        """Whether the output for `source` is a video."""
        return (is_video(source) or self.animations) and not self.stills

    def applies(self, source: Path) -> bool:
        """Whether `format` is one for the output of `source`."""
        return self.format != "keep" and (self.format in _VIDEO_FORMATS) == self.gives_video(source)

    def named(self, path: Path) -> Path:
        """The name of the output for `path`, the name of the input. --format applies to images or to videos."""
        ending = path.suffix
        if is_archive(path):  # --format is that of its images
            return path.with_name(path.stem + self.suffix + ending)
        if self.applies(path):
            ending = f".{self.format}"
        elif self.stills:
            ending = ".png"
        elif is_video(path) and ending.lower() not in CONTAINERS:
            ending = ".mkv"  # the container for all kinds of streams
        elif ending.lower() in READ_ONLY:
            ending = ".png"
        return path.with_name(path.stem + self.suffix + ending)


def _jobs_of(source: Path, output: str, naming: _Naming, recursive: bool, plan: Plan) -> list[Job]:
    """The jobs of one file, folder or pattern. Other files are recorded in `plan`."""
    wanted = partial(_is_wanted, plan)
    if source.is_dir() and naming.as_frames:
        return [Job(source, _target_of_frames(source, output, naming))]
    if source.is_dir():
        found = find_images(source, recursive=recursive, wanted=wanted, problems=plan.problems)
        return _folder_jobs(source, found, Path(output), naming, plan)
    if source.exists():
        return [Job(source, _target_of_file(source, output, naming))]
    if glob.has_magic(str(source)):
        root, matching = _matching(source)
        found = [path for path in matching if is_archive(path) or wanted(path.name)]
        return _folder_jobs(root, found, Path(output), naming, plan, f"no images or videos match {source}")
    if str(source) == "-":
        raise InputError("the input -: pdd doesn't read from a pipe", "Give a file or a folder.")
    raise InputError(f"{source}: no such file or folder")


def _jobs_of_list(sources: Sequence[Path], output: str, naming: _Naming, recursive: bool, plan: Plan) -> list[Job]:
    """The jobs of listed files and folders."""
    found: list[Path] = []
    for source in sources:
        path = source.absolute()
        if path.is_dir():
            found += find_images(path, recursive=recursive, wanted=_is_input, problems=plan.problems)
        elif not path.exists():
            plan.problems.append(f"{source}: no such file or folder")
        elif _is_input(path):
            found.append(path)
        else:
            plan.others[path.suffix.lower() or "without suffix"] += 1
    try:
        root = Path(os.path.commonpath([path.parent for path in found] or [Path.cwd()]))
    except ValueError as error:  # drives of Windows
        raise InputError("the listed files are on several drives", "Make a list for each drive.") from error
    return _folder_jobs(root, list(dict.fromkeys(found)), Path(output), naming, plan, "no image or video is listed")


def _is_folder_name(output: str) -> bool:
    """Whether `output` is a folder: it exists as one, ends in a slash, or has no suffix and doesn't exist."""
    path = Path(output)
    return path.is_dir() or output.endswith(("/", os.sep)) or (not path.suffix and not path.exists())


def manifest_folder(sources: Sequence[Path], output: str, jobs: Sequence[Job], *, strip: bool) -> Path | None:
    """The folder for the manifest of a run; None for a single file, whose metadata says that pdd made it.

    A single file without metadata (`strip`) also needs a manifest.
    """
    if len(sources) == 1 and len(jobs) == 1 and jobs[0].source == sources[0]:
        return jobs[0].target.parent if strip else None
    return Path(output)


def _matching(pattern: Path) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard, and the matching files. ** matches folders at any depth."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    root = Path(*fixed)
    found = (Path(name) for name in glob.iglob(str(pattern), recursive=True))  # noqa: PTH207 - a pattern of any kind
    return root, sorted(path for path in found if path.is_file())


def _folder_jobs(
    source: Path, found: Sequence[Path], output: Path, naming: _Naming, plan: Plan, empty: str = ""
) -> list[Job]:
    jobs = _jobs_in(source, found, output, naming, plan)
    if not jobs:
        kinds = f", only {_counted(plan.others)}" if plan.others else ""
        raise InputError(
            "\n".join([f"{empty or f'{source}: no images or videos in it'}{kinds}", *plan.problems]),
            "pdd reads PNG, JPEG, WebP, GIF, TIFF, BMP, TGA, DDS, AVIF, HEIC and JPEG XL files, and videos.",
        )
    return jobs


def _jobs_in(source: Path, found: Sequence[Path], output: Path, naming: _Naming, plan: Plan) -> list[Job]:
    if output.exists() and not output.is_dir():
        raise InputError(f"{source} is a folder, but {output} is a file", "Give a folder for the outputs.")
    if not output.exists() and _is_input(output):
        raise InputError(
            f"{source} is not a single file, but the output {output} has the suffix of a file",
            "Add --fps 25 to make a video of the images in it."
            if is_video(output)
            else "Give a folder for the outputs, without such a suffix.",
        )
    inside, outside = source.resolve(), output.resolve()
    if inside == outside and not naming.suffix:
        raise InputError(
            f"the outputs would be mixed with the inputs in {source}",
            "Choose another folder for the outputs, or add, for example, --suffix _x4.",
        )
    if outside != inside and outside.is_relative_to(inside):
        # Outputs of earlier runs are not inputs.
        found = [path for path in found if not path.resolve().is_relative_to(outside)]
    made = _outputs_among(found, source)
    jobs = [Job(path, naming.named(output / path.relative_to(source))) for path in found if path not in made]
    if inside == outside:
        outputs = {job.target.resolve() for job in jobs}
        jobs = [job for job in jobs if job.source.resolve() not in outputs]
    plan.outputs.extend(sorted(made))
    return jobs


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _outputs_among(found: Sequence[Path], source: Path) -> set[Path]:
    """Those of `found` that pdd made from another one of them, according to a manifest or to their metadata."""
    present = {path.resolve(): path for path in found}
    by_stem: dict[str, list[Path]] = {}
    for path in found:
        by_stem.setdefault(path.stem, []).append(path)
    folders = {parent for path in found for parent in path.parents if parent == source or source in parent.parents}
    records = {
        path.resolve(): made_from
        for folder in folders
        if (folder / NAME).is_file()
        for path, made_from in Manifest(folder, {}).inputs().items()
    }
    digests: dict[Path, str] = {}

    def is_output(path: Path) -> bool:
        real = path.resolve()
        made_from = records.get(real)
        if made_from is not None and made_from.resolve() in present:
            return True
        # --suffix only adds to the name of the input.
        stems = (path.stem[:end] for end in range(1, len(path.stem) + 1))
        inputs = [other for stem in stems for other in by_stem.get(stem, ()) if other != path]
        if real in records and made_from is None:  # by an earlier version, which did not record the input
            return any(other.parent == path.parent and other.resolve() not in records for other in inputs)
        # Also of one that is recorded: its folder may have been moved since.
        digest = source_of(path) if inputs else None
        if digest is None:
            return False
        for other in inputs:
            if other not in digests:
                try:
                    digests[other] = file_sha256(other)
                except OSError:
                    digests[other] = ""
        return digest in (digests[other] for other in inputs)

    return {path for path in found if is_output(path)}


def _target_of_frames(source: Path, output: str, naming: _Naming) -> Path:
    """The video of a folder of frames."""
    path = Path(output)
    if naming.format != "keep" and naming.format not in _VIDEO_FORMATS:
        raise InputError(f"--format {naming.format} and --fps can't be combined: --fps makes videos", "Omit one.")
    ending = ".mp4" if naming.format == "keep" else f".{naming.format}"
    if _is_folder_name(output):
        return path / f"{source.resolve().name}{naming.suffix}{ending}"
    check_video_name(path)
    if naming.format != "keep" and not _same_format(path, naming.format):
        raise InputError(f"--format {naming.format} contradicts the name {path}", "Omit --format, or change the name.")
    return path.with_name(path.stem + naming.suffix + path.suffix)


def _target_of_file(source: Path, output: str, naming: _Naming) -> Path:
    path, format = Path(output), naming.format
    if is_archive(source):
        if format in _VIDEO_FORMATS:
            raise InputError(f"--format {format} can't be used for {source}", "Omit it, or choose an image format.")
        is_folder = _is_folder_name(output)
        target = (
            naming.named(path / source.name) if is_folder else path.with_name(path.stem + naming.suffix + path.suffix)
        )
        if target.suffix.lower() not in ARCHIVES:
            raise InputError(f"{source} is an archive, but the output {path} is not", f"Use {' or '.join(ARCHIVES)}.")
        return target
    to_video = naming.gives_video(source)
    if is_image(source) and (format in _VIDEO_FORMATS or (not _is_folder_name(output) and is_video(path))):
        to_video = True  # an animation; a single image is rejected when it is read
        naming = replace(naming, animations=True)
    if to_video and format not in ("keep", *_VIDEO_FORMATS):
        if not _is_folder_name(output):
            raise InputError(
                f"the frames of {source} are several files, but the output {output} is one",
                "Give a folder, or use --preview TIME for one frame.",
            )
        format_of(Path(f"x.{format}"))
        name = source.stem + naming.suffix
        # The folder of holiday.mov.mp4 would have the name of a video.
        return path / (f"{name}_frames" if is_video(name) else name)
    check = check_video_name if to_video else format_of
    if format != "keep" and not naming.applies(source):
        raise InputError(f"--format {format} can't be used for {source}", "Omit it, or choose another format.")
    if _is_folder_name(output):
        if not _is_input(source) and format == "keep":
            probe(source, most_pixels=2**62)  # raises for files that pdd doesn't read
            raise InputError(
                f"{source}: pdd can't write {f'{source.suffix} files' if source.suffix else 'files without a suffix'}",
                "Add --format png, or give the name of the output file.",
            )
        target = naming.named(path / source.name)
        check(target)
        return target
    check(path)
    if format != "keep" and not _same_format(path, format):
        raise InputError(f"--format {format} contradicts the name {path}", "Omit --format, or change the name.")
    return path.with_name(path.stem + naming.suffix + path.suffix)


def _same_format(path: Path, format: FormatChoice) -> bool:
    named = FORMATS.get(f".{format}", format)
    return FORMATS.get(path.suffix.lower(), path.suffix.lower().lstrip(".")) == named


def _is_input(path: Path | str) -> bool:
    return is_image(path) or is_video(path) or is_archive(path)


def _is_wanted(plan: Plan, name: str) -> bool:
    """Whether a file in a folder is an input; others are counted in `plan`."""
    if not (found := _is_found(name)) and name != DEFAULT_FILE.name:
        plan.others[Path(name).suffix.lower() or "without suffix"] += 1
    return found


def _is_found(name: str) -> bool:
    """Whether a file in a folder is an input. Of archives only comics: other ones must be named."""
    return _is_input(name) and Path(name).suffix.lower() != ".zip"


def check_collisions(
    jobs: Sequence[Job], protected: Iterable[Path] = (), hint: str = "Name another output, or add --suffix _x4."
) -> None:
    """Raise InputError if an output would replace an input or a `protected` file, or two inputs have the same output.

    Links and different spellings of a name that refer to the same file are recognised.
    """
    for _, error in collisions(jobs, protected, hint):
        raise error


def collisions(
    jobs: Sequence[Job], protected: Iterable[Path] = (), hint: str = "Name another output, or add --suffix _x4."
) -> Iterator[tuple[Job, InputError]]:
    """The jobs for which `check_collisions` would raise, and the error; of two with the same output the later one."""
    inputs = {_identity(path) for path in (*(job.source for job in jobs), *protected)}
    targets = [job.target.resolve() for job in jobs]
    similar = Counter(_similar(target) for target in set(targets))
    by_target: dict[Path, Path] = {}
    for job, target in zip(jobs, targets, strict=True):
        if _identity(job.target) in inputs:
            yield job, InputError(f"the output {job.target} would replace an input", hint)
        if similar[_similar(target)] > 1 and is_case_insensitive(target.parent):
            target = _similar(target)
        other = by_target.setdefault(target, job.source)
        if other != job.source:
            yield (
                job,
                InputError(
                    f"{other} and {job.source} would have the same output {job.target}",
                    "Rename one of them, or upscale them into separate folders.",
                ),
            )


def _similar(path: Path) -> Path:
    """A path that is equal for all spellings that a case-insensitive file system takes for the same name."""
    return Path(unicodedata.normalize("NFC", str(path)).casefold())


def _identity(path: Path) -> tuple[int, int] | Path:
    """An identifier that is equal for all names of a file: device and inode, or the resolved path if none exists."""
    try:
        status = path.stat()
    except OSError:
        return path.resolve()
    return (status.st_dev, status.st_ino) if status.st_ino else path.resolve()
