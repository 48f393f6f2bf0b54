"""Upscale the images in ZIP archives (comics: .cbz); everything else in them is copied."""

from __future__ import annotations

import lzma
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from pdd_cli.errors import InputError, ResourceError
from pdd_cli.files import BeforeRename, atomic_write, write_errors
from pdd_cli.imaging.decode import probe
from pdd_cli.imaging.formats import FORMATS, READ_ONLY, STREAMED, format_of
from pdd_cli.imaging.provenance import DEFAULTS, seal, sealed_text
from pdd_cli.upscaling.jobs import Abandoned, Job, Output, Result, check_name, failed, hidden_folder, recorded, skipped
from pdd_cli.upscaling.manifest import Manifest
from pdd_cli.upscaling.pipeline import run_jobs
from pdd_cli.upscaling.upscaler import OnTile, Upscaler
from pdd_cli.weights.sources import file_sha256

ARCHIVES = (".cbz", ".zip")
"""Suffixes of the archives that pdd reads and writes."""

# An archive that expands to more than this, and to more than so many times its size, counts as a decompression bomb.
_MOST_BYTES, _MOST_TIMES = 1 << 30, 200
_LONGEST_COMMENT = 65_535
_ENCRYPTED, _UTF8 = 0x1, 0x800


def is_archive(path: Path | str) -> bool:
    """Whether the suffix is one of ARCHIVES."""
    return Path(path).suffix.lower() in ARCHIVES


def run_archives(
    jobs: Iterable[Job],
    upscaler: Upscaler,
    *,
    recipe: Mapping[str, object],
    format: str = "keep",
    output: Output = Output(),
    manifest: Manifest | None = None,
    on_start: Callable[[Job], None] = lambda job: None,
    on_tile: OnTile = lambda done, total: None,
) -> Iterator[Result]:
    """Do the jobs, whose inputs and outputs are archives, and yield the result of each.

    Finished pages are kept in a hidden folder beside the output until it is complete, so that an interrupted run
    continues. A page that can't be read or upscaled is copied as it is, and named. `format`: of the pages; one of
    videos is not for them.
    """
    format = _of_pages(format)
    output = _with_format(output, format)
    run = _Run(upscaler, recipe, format, output, on_tile)
    for job in jobs:
        started = time.perf_counter()
        try:
            digest = file_sha256(job.source)
            key = _key(digest, format, manifest)
            result = skipped(job, digest, key, output, manifest)
            if result is None:
                on_start(job)
                check_name(job.target)
                with recorded(job, key, manifest) as before_rename:
                    result = _upscale(job, digest, run, before_rename)
                result = replace(result, seconds=time.perf_counter() - started)
        except (Abandoned, ResourceError):
            raise
        except Exception as error:
            result = failed(job, error, started)
        yield result


def preview_archives(
    jobs: Sequence[Job],
    upscaler: Upscaler,
    *,
    format: str = "keep",
    output: Output = Output(),
    manifest: Manifest | None = None,
) -> Iterator[Result]:
    """Predict the results of `run_archives` from the headers of the pages."""
    format = _of_pages(format)
    output = _with_format(output, format)
    for job in jobs:
        started = time.perf_counter()
        try:
            digest = file_sha256(job.source)
            result = skipped(job, digest, _key(digest, format, manifest), output, manifest)
            if result is None:
                result = _preview(job, upscaler, format)
        except Exception as error:
            result = failed(job, error, started)
        yield result


def _of_pages(format: str) -> str:
    return format if f".{format}" in FORMATS else "keep"


def _with_format(output: Output, format: str) -> Output:
    """`output` with the format of the pages among the options, for the name of an archive doesn't tell it."""
    made = output.provenance
    if made is None or format == "keep":
        return output
    options = f"{made.options.removeprefix(DEFAULTS)} --format {format}".strip()
    return replace(output, provenance=replace(made, options=options))


def _key(digest: str, format: str, manifest: Manifest | None) -> str:
    """The key of an output. The format is not in its name, as that of an image is."""
    if manifest is None:
        return ""
    return manifest.key(digest) if format == "keep" else f"{manifest.key(digest)}-{format}"


def _preview(job: Job, upscaler: Upscaler, format: str) -> Result:
    seconds, memory, tiles, unreadable = 0.0, 0, 0, []
    with _opened(job.source) as archive:
        pages = _pages(archive, job.source, format)
        for page in pages:
            try:
                header = probe(Path(page.name), archive.read(page.info), most_pixels=upscaler.most_pixels)
            except Exception:
                unreadable.append(page.name)
                continue
            estimate = upscaler.estimate(header.spec, streamed=format_of(Path(page.new_name)) in STREAMED)
            seconds, memory = seconds + estimate.seconds, max(memory, estimate.memory)
            tiles += upscaler.tiles(*header.size)
    about = [f"{len(pages)} images", *([f"can't be read: {', '.join(unreadable)}"] if unreadable else [])]
    return Result(
        job, "planned", "; ".join(about), tiles=tiles, seconds=seconds, model_seconds=seconds, memory=memory,
        frames=len(pages),
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """What is the same for all archives: the arguments of `run_archives`."""

    upscaler: Upscaler
    recipe: Mapping[str, object]
    format: str
    output: Output
    on_tile: OnTile


@dataclass(frozen=True)
class _Page:
    """An image in an archive, and its name in the output."""

    info: zipfile.ZipInfo
    number: int
    new_name: str

    @property
    def name(self) -> str:
        return self.info.filename


class _ArchiveError(InputError):
    """The archive is damaged, or packed in a way that zipfile doesn't know."""


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive. What is read of it in the context raises _ArchiveError, too."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except NotImplementedError as error:  # Deflate64 of Windows, PPMd and others
        raise _ArchiveError(f"can't read {path}: {error}", "Pack it again as a usual ZIP file.") from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise _ArchiveError(f"can't read {path}: not a ZIP archive, or damaged ({error})") from error


class _Member(zipfile.ZipInfo):
    """A new member with the date, attributes and comment of `member`.

    A name that isn't marked as UTF-8 keeps its bytes, in whatever encoding they are: zipfile reads it as code page 437,
    and would write the characters that this gives as UTF-8.
    """

    def __init__(self, member: zipfile.ZipInfo, name: str) -> None:
        super().__init__(name, member.date_time)
        self.external_attr, self.comment = member.external_attr, member.comment
        self.create_system = member.create_system
        self._is_utf8 = bool(member.flag_bits & _UTF8)

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 - zipfile has no public way
        if not self._is_utf8:
            with suppress(UnicodeEncodeError):  # its Unicode name was in an extra field
                return self.filename.encode("cp437"), self.flag_bits
        return self.filename.encode(), self.flag_bits | _UTF8


def _pages(archive: zipfile.ZipFile, path: Path, format: str) -> list[_Page]:
    """The images of an archive. Raises InputError for one that is hostile, encrypted or without images."""
    members = archive.infolist()
    size = sum(member.file_size for member in members)
    if size > max(_MOST_BYTES, _MOST_TIMES * path.stat().st_size):
        raise InputError(f"{path}: it would expand to {size / 2**30:.1f} GiB, as a decompression bomb does")
    for member in members:
        name = member.filename
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if name.startswith(("/", "\\")) or ".." in parts or PureWindowsPath(name).drive:
            raise InputError(f"{path}: the name {name} leads out of the archive", "Pack it again.")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(f"{path}: {name} is a link", "Pack it again without links.")
        if member.flag_bits & _ENCRYPTED:
            raise InputError(f"{path}: {name} is encrypted", "Unpack it, and pack it again without a password.")
    pages = []
    for number, member in enumerate(members):
        inside = PurePosixPath(member.filename)
        hidden = inside.name.startswith(".") or inside.parts[:1] == ("__MACOSX",)
        if not member.is_dir() and not hidden and inside.suffix.lower() in {**FORMATS, **READ_ONLY}:
            ending = ".png" if inside.suffix.lower() in READ_ONLY else inside.suffix
            ending = ending if format == "keep" else f".{format}"
            pages.append(_Page(member, number, member.filename.removesuffix(inside.suffix) + ending))
    if not pages:
        raise InputError(f"{path}: no images in it")
    new = {page.number: page.new_name for page in pages}
    names = [new.get(number, member.filename) for number, member in enumerate(members)]
    twice = [page.new_name for page in pages if page.new_name != page.name and names.count(page.new_name) > 1]
    if twice:
        raise InputError(f"{path}: two of its members would become {twice[0]}", "Rename one of them.")
    return pages


def _upscale(job: Job, digest: str, run: _Run, before_rename: BeforeRename) -> Result:
    work = hidden_folder(job.target, "pages")
    if run.output.overwrite:
        shutil.rmtree(work, ignore_errors=True)
    try:
        made, notes = _upscale_pages(job, digest, run, before_rename, work)
    except _ArchiveError:
        shutil.rmtree(work, ignore_errors=True)  # it would fail there again
        raise
    shutil.rmtree(work, ignore_errors=True)
    done = [result for result in made.values() if result.status != "failed"]
    if not done:
        raise InputError(f"{job.source}: none of its {len(made)} images could be upscaled")
    left_out = tuple(dict.fromkeys(name for result in done for name in result.left_out))
    return Result(
        job,
        "done",
        "; ".join([*notes, *([f"left out: {', '.join(left_out)}"] if left_out else [])]),
        size_in=next((result.size_in for result in done if result.size_in), None),
        size_out=next((result.size_out for result in done if result.size_out), None),
        tiles=sum(result.tiles for result in done),
        model_seconds=sum(result.model_seconds for result in done),
        frames=len(made),
        left_out=left_out,
    )


def _upscale_pages(
    job: Job, digest: str, run: _Run, before_rename: BeforeRename, work: Path
) -> tuple[Mapping[int, Result], list[str]]:
    """Upscale the pages into the folder `work` and write the archive. Returns the results by number, and notes."""
    with _opened(job.source) as archive:
        pages = _pages(archive, job.source, run.format)
        with write_errors(job.target):
            work.mkdir(parents=True, exist_ok=True)
        page_jobs = {_page_job(page, work): page for page in pages}

        def unpacked() -> Iterator[Job]:
            for page_job, page in page_jobs.items():
                with archive.open(page.info) as packed, write_errors(job.target), page_job.source.open("wb") as file:
                    shutil.copyfileobj(packed, file)
                yield page_job

        # The output of the archive may be overwritten; its pages are those of this run or of one that was interrupted.
        own = replace(run.output, overwrite=False)
        made: dict[int, Result] = {}
        manifest = Manifest(work, run.recipe, provenance=own.provenance)
        for result in run_jobs(unpacked(), run.upscaler, output=own, manifest=manifest, on_tile=run.on_tile):
            result.job.source.unlink(missing_ok=True)
            made[page_jobs[result.job].number] = result
        if all(result.status == "failed" for result in made.values()):
            return made, []
        return made, _write(job, digest, archive, pages, made, run.output, before_rename)


def _page_job(page: _Page, work: Path) -> Job:
    """Numbered files: nothing is unpacked to a name that an archive contains."""
    suffix = PurePosixPath(page.name).suffix
    return Job(work / f"{page.number:06d}.in{suffix}", work / f"{page.number:06d}{PurePosixPath(page.new_name).suffix}")


def _write(
    job: Job,
    digest: str,
    archive: zipfile.ZipFile,
    pages: Sequence[_Page],
    made: Mapping[int, Result],
    output: Output,
    before_rename: BeforeRename,
) -> list[str]:
    """Write the archive with the same members in the same order. Returns notes."""
    notes = []
    by_number = {page.number: page for page in pages}
    with atomic_write(job.target, before_rename) as temporary:
        with zipfile.ZipFile(temporary, "w", strict_timestamps=False) as written:
            for number, member in enumerate(archive.infolist()):
                page, result = by_number.get(number), made.get(number)
                if page is None or result is None or result.status == "failed":
                    copy = _Member(member, member.filename)
                    copy.compress_type = member.compress_type
                    if page is not None:
                        reason = result.problem.partition(": ")[2] if result is not None else ""
                        notes.append(f"{page.name} is copied unchanged: {reason or 'not upscaled'}")
                    if member.filename.lower().endswith("comicinfo.xml") and b"ImageWidth" in archive.read(member):
                        notes.append(f"{member.filename} is copied with the page sizes of the input")
                    with archive.open(member) as packed, written.open(copy, "w", force_zip64=True) as file:
                        shutil.copyfileobj(packed, file)
                    continue
                about = [part for part in result.problem.split("; ") if part and not part.startswith("left out")]
                notes += [f"{page.name}: {part}" for part in about]
                copy = _Member(member, page.new_name)
                copy.compress_type = zipfile.ZIP_STORED  # its content is compressed already
                with result.job.target.open("rb") as image, written.open(copy, "w", force_zip64=True) as file:
                    shutil.copyfileobj(image, file)
            written.comment = _comment(archive.comment, digest, output)
        seal(temporary)
    return notes


def _comment(comment: bytes, digest: str, output: Output) -> bytes:
    """The comment of the input with the record of how the output was made, by which pdd recognises it."""
    if output.provenance is None or output.strip:
        return comment
    record = sealed_text(replace(output.provenance, source_sha256=digest)).encode(errors="replace")
    return comment[: _LONGEST_COMMENT - len(record) - 1] + (b"\n" if comment else b"") + record
