"""Weights in any model repository of the Hugging Face Hub: `hf:USER/NAME[/FILE][@REVISION]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pdd_cli.errors import DownloadError, InputError
from pdd_cli.weights import sources
from pdd_cli.weights.catalog import HuggingFace
from pdd_cli.weights.states import HUB_PREFIX, SUFFIXES

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@\s]+))?")


@dataclass(frozen=True)
class HubReference:
    """A model repository, and optionally a file in it and a revision (a branch, tag or commit)."""

    repo: str
    file: str | None
    revision: str | None


def parse(reference: str) -> HubReference:
    """The parts of `hf:USER/NAME[/FILE][@REVISION]`. Raises InputError."""
    found = _REFERENCE.fullmatch(reference.removeprefix(HUB_PREFIX))
    if found is None:
        raise InputError(f"{reference}: not a repository of the Hugging Face Hub", "Write hf:USER/NAME[/FILE][@REV].")
    return HubReference(**found.groupdict())


def fetch_from_hub(reference: str, *, offline: bool, on_bytes: sources.OnBytes) -> Path:
    """The weights file in the Hub's cache, downloaded if it is missing and verified by the Hub's sha256.

    Without FILE it is the repository's only safetensors file or, without one, its only .pth, .pt or .ckpt file. Nothing
    in it is run. Respects HF_ENDPOINT, HF_HUB_OFFLINE and tokens.

    Raises InputError for a repository without weights, or with several; DownloadError if it can't be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    wanted = parse(reference)
    if offline or constants.HF_HUB_OFFLINE:
        return _cached(reference, wanted)
    try:
        info = huggingface_hub.HfApi().model_info(
            wanted.repo, revision=wanted.revision, files_metadata=True, timeout=30
        )
    except Exception as error:  # errors of the Hub and of its HTTP client, which differs between releases
        raise DownloadError(f"{reference}: {sources.reason(error, constants.ENDPOINT)}") from error
    checksums = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    name = choose(reference, wanted, list(checksums))
    source = HuggingFace(wanted.repo, name)
    return sources.huggingface(source, sha256=checksums[name], on_bytes=on_bytes, revision=wanted.revision)


def choose(reference: str, wanted: HubReference, names: list[str]) -> str:
    """The weights file among the files of a repository. Raises InputError if there is none, or more than one."""
    if wanted.file is not None:
        if wanted.file in names:
            return wanted.file
        raise InputError(f"{reference}: {wanted.repo} has no file {wanted.file}", f"It has: {', '.join(names)}.")
    for suffixes in ((".safetensors",), SUFFIXES):
        found = [name for name in names if PurePosixPath(name).suffix.lower() in suffixes]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"{reference}: {wanted.repo} has {len(found)} weights files",
                f"Name one: hf:{wanted.repo}/FILE with FILE one of {', '.join(found)}.",
            )
    raise InputError(
        f"{reference}: {wanted.repo} has no weights ({', '.join(names) or 'no files'})",
        f"pdd reads {', '.join(SUFFIXES)}.",
    )


def _cached(reference: str, wanted: HubReference) -> Path:
    """The file in the Hub's cache. The cache names large files by their sha256, which is compared."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True))
    except Exception as error:
        raise DownloadError(
            f"{reference} is not in the Hub's cache, and nothing may be fetched now (offline, or a dry run)",
            "Run it once with a network and without --dry-run.",
        ) from error
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    path = folder / choose(reference, wanted, names)
    digest = path.resolve().name
    if problem := sources.find_damage(path, digest if re.fullmatch("[0-9a-f]{64}", digest) else None, None):
        raise DownloadError(f"{reference}: {problem}", f"Delete {path} and fetch it again.")
    return path
