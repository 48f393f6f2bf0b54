"""Weights in any model repository of the Hugging Face Hub: `hf:USER/NAME[/FILE][@REVISION]`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pdd_cli.errors import DownloadError, InputError
from pdd_cli.weights import sources
from pdd_cli.weights.catalog import HuggingFace
from pdd_cli.weights.states import HUB_PREFIX, SUFFIXES
from pdd_cli.weights.store import Card, card_from

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
    from huggingface_hub import constants

    wanted = parse(reference)
    if offline or constants.HF_HUB_OFFLINE:
        return _cached(reference, wanted)
    found = find_on_hub(reference)
    source = HuggingFace(found.repo, found.name)
    return sources.huggingface(source, sha256=found.sha256, on_bytes=on_bytes, revision=wanted.revision)


@dataclass(frozen=True)
class HubFile:
    """A weights file on the Hub, as the Hub describes it. `labels`: licence, tags and more of the repository."""

    repo: str
    name: str
    commit: str | None
    size: int | None
    sha256: str | None
    labels: Mapping[str, Any]


def find_on_hub(reference: str) -> HubFile:
    """The weights file that `reference` names; it is not downloaded.

    Raises InputError for a repository without weights, with several, of another kind, or without this revision;
    DownloadError if it can't be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    wanted, api = parse(reference), huggingface_hub.HfApi()
    try:
        info = api.model_info(wanted.repo, revision=wanted.revision, files_metadata=True, timeout=30)
    except RevisionNotFoundError as error:
        raise InputError(
            f"{reference}: {wanted.repo} has no revision {wanted.revision}", _revisions(wanted.repo)
        ) from error
    except RepositoryNotFoundError as error:
        for kind in ("dataset", "space"):
            exists = False
            with contextlib.suppress(Exception):
                exists = api.repo_exists(wanted.repo, repo_type=kind)
            if exists:
                raise InputError(f"{reference}: {wanted.repo} is a {kind}, not a model") from error
        raise DownloadError(
            f"{reference}: there is no model {wanted.repo} on the Hub, or it is private",
            "For a private one run `hf auth login`, or set HF_TOKEN.",
        ) from error
    except Exception as error:  # errors of the Hub and of its HTTP client, which differs between releases
        raise failure(reference, error) from error
    files = {file.rfilename: file for file in info.siblings or []}
    file = files[choose(reference, wanted, list(files))]
    labels = info.card_data.to_dict() if info.card_data else {}
    return HubFile(wanted.repo, file.rfilename, info.sha, file.size, file.lfs.sha256 if file.lfs else None, labels)


def read_card_on_hub(found: HubFile) -> Card | None:
    """The card in the header of a safetensors file on the Hub, of which only the header is downloaded.

    None if it has none, or is of another format. Raises DownloadError.
    """
    import huggingface_hub

    if not found.name.endswith(".safetensors"):
        return None
    try:
        header = huggingface_hub.HfApi().parse_safetensors_file_metadata(
            found.repo, found.name, revision=found.commit, timeout=30
        )
    except Exception as error:
        raise failure(f"hf:{found.repo}/{found.name}", error) from error
    return card_from(header.metadata)


def failure(subject: str, error: BaseException) -> DownloadError:
    """The error for a request to the Hub that failed: the server's answer, or why there is none."""
    from huggingface_hub import constants

    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if code := getattr(response, "status_code", None):
            said = getattr(cause, "server_message", None)
            text = f"the server answered {code}{sources.MEANINGS.get(code, '')}{f': {said}' if said else ''}"
            return DownloadError(f"{subject}: {text}")
        cause = cause.__cause__ or cause.__context__
    return DownloadError(f"{subject}: {sources.reason(error, constants.ENDPOINT)}")


def _revisions(repo: str) -> str:
    """A hint with the branches and tags of a repository; "" if they can't be listed."""
    import huggingface_hub

    with contextlib.suppress(Exception):
        refs = huggingface_hub.HfApi().list_repo_refs(repo)
        return f"Its branches and tags: {', '.join(ref.name for ref in (*refs.branches, *refs.tags))}."
    return ""


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
                f"Choose one: hf:{wanted.repo}/FILE, where FILE is one of {', '.join(found)}.",
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
