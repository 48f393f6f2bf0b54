"""`pdd export --to hub`: uploads weights with a model card to a repository of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdd_cli.errors import DownloadError, InputError, PddError
from pdd_cli.exporting.formats import check_packages, write
from pdd_cli.exporting.model_card import MARK, CardFile, model_card
from pdd_cli.models.loading import SRModel
from pdd_cli.observer import Observer
from pdd_cli.version import __version__
from pdd_cli.weights.hub import failure
from pdd_cli.weights.sources import file_sha256
from pdd_cli.weights.states import HUB_PREFIX, read_state, state_sha256
from pdd_cli.weights.store import read_card

BEST = "best.safetensors"
"""The weights in a run's folder."""
COMPARISON = "comparison.png"
"""The picture of LR images, upscaled with base and adapted weights, in a run's folder and in the repository."""


@dataclass(frozen=True)
class Upload:
    """The uploaded files, and the commit."""

    repo: str
    url: str
    commit: str
    files: Sequence[str]

    def as_document(self) -> dict[str, object]:
        """For --json."""
        return {"repo": self.repo, "url": self.url, "commit": self.commit, "files": list(self.files)}


@dataclass(frozen=True)
class Repository:
    """A repository that the user may write to, as far as this can be known before the upload."""

    name: str
    exists: bool
    files: frozenset[str] = frozenset()
    is_own: bool = True  # its model card was written by pdd


def open_repository(name: str) -> Repository:
    """Check the name, the login and what is in the repository; it need not exist.

    Raises InputError for an invalid name, DownloadError if there is no login, or the Hub can't be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--repo {name}: {error}", "Write USER/NAME.") from error
    if name.count("/") != 1:
        raise InputError(f"--repo {name}: not a repository of the Hugging Face Hub", "Write USER/NAME.")
    if constants.HF_HUB_OFFLINE:
        raise DownloadError("nothing can be uploaded: HF_HUB_OFFLINE is set")
    if huggingface_hub.get_token() is None:
        raise DownloadError(
            "not logged in to the Hugging Face Hub",
            "Run `hf auth login`, or set HF_TOKEN to a token with write access.",
        )
    api = huggingface_hub.HfApi()
    with _errors(name):
        api.whoami()
        try:
            info = api.model_info(name, timeout=30)
        except RepositoryNotFoundError:
            return Repository(name, exists=False)
        files = frozenset(file.rfilename for file in info.siblings or [])
        text = ""
        if "README.md" in files:
            text = Path(huggingface_hub.hf_hub_download(name, "README.md")).read_text("utf-8", errors="replace")
    return Repository(name, exists=True, files=files, is_own=MARK in text)


def upload(
    model: SRModel,
    source: Path,
    repository: Repository,
    *,
    private: bool,
    pictures: bool,
    overwrite: bool,
    observer: Observer,
) -> Upload:
    """Write the files into a temporary folder, then upload them in one commit. `source`: the weights as installed.

    Raises InputError if files of the repository would be replaced that `overwrite` doesn't allow; DownloadError if the
    upload fails. Then the repository has no part of the files.
    """
    import huggingface_hub

    card = model.card
    assert card is not None
    with tempfile.TemporaryDirectory(prefix="pdd-") as scratch:
        folder = Path(scratch)
        names = _stage(model, source, folder, repository.name, pictures=pictures, observer=observer)
        _check_replaced(repository, names, overwrite=overwrite)
        api = huggingface_hub.HfApi()
        observer.say(f"uploading to {repository.name}: {', '.join(names)}")
        with _errors(repository.name):
            if not repository.exists:
                api.create_repo(repository.name, private=private or None)  # None: the default of USER
            operations = [
                huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name))
                for name in names
            ]
            with _silent():
                done = api.create_commit(
                    repository.name, operations, commit_message=f"{card.name}, exported by pdd {__version__}"
                )
    url = f"{api.endpoint}/{repository.name}"
    observer.say(f"uploaded: {url}")
    observer.say(f"next: pdd upscale IN OUT --weights {HUB_PREFIX}{repository.name}")
    return Upload(repository.name, url, done.oid, names)


def _stage(model: SRModel, source: Path, folder: Path, repo: str, *, pictures: bool, observer: Observer) -> list[str]:
    """Write the files of the repository into `folder`; returns their names."""
    card = model.card
    assert card is not None
    weights = folder / f"{card.name}.safetensors"
    write("safetensors", weights, model)
    described = [CardFile(weights.name, "weights; the header has the card of pdd", file_sha256(weights))]
    try:
        check_packages(["onnx"], "--to")
        graph = folder / f"{card.name}.onnx"
        write("onnx", graph, model)
        described.append(CardFile(graph.name, "ONNX graph for images of any size, RGB in 0..1", file_sha256(graph)))
    except InputError as error:
        observer.warn(f"no ONNX graph is uploaded: {error.message.replace(f'{folder}/', '')}")
    run, verdict = _run_folder(source, observer), None
    if run is not None:
        with contextlib.suppress(OSError, ValueError):
            verdict = json.loads((run / "verdict.json").read_text(encoding="utf-8"))
    picture = None
    if pictures and run is not None:
        if (run / COMPARISON).is_file():
            picture = COMPARISON
            _copy_pixels(run / COMPARISON, folder / COMPARISON)
            observer.say(f"the model card shows crops of your images: {run / COMPARISON} (to leave out: --no-pictures)")
        else:
            observer.warn(
                f"the model card has no pictures: there is no {run / COMPARISON} (to make it: pdd adapt --resume "
                f"--name {run.name} --runs-dir {run.parent})"
            )
    (folder / "README.md").write_text(model_card(model, repo, described, picture, verdict), encoding="utf-8")
    return ["README.md", *(file.name for file in described), *([picture] if picture else [])]


def _run_folder(source: Path, observer: Observer) -> Path | None:
    """The folder of the run that made the weights at `source`, by its card; None if there is none.

    A card may be another's, and name any folder of this machine: the weights in the folder must be these.
    """
    card = read_card(source)
    settings: Any = (card.adapted or {}).get("settings") if card is not None else None
    if card is None or not isinstance(settings, dict) or not isinstance(settings.get("runs_dir"), str):
        return None
    folder = Path(settings["runs_dir"]) / str(settings.get("name") or card.name)
    if not folder.is_absolute() or not (folder / "config.yaml").is_file():
        return None
    with contextlib.suppress(PddError, OSError):
        if state_sha256(read_state(folder / BEST)) == state_sha256(read_state(source)):
            return folder
    observer.warn(f"the model card has no pictures and no scores: {folder / BEST} doesn't contain these weights")
    return None


def _copy_pixels(picture: Path, target: Path) -> None:
    """Copy only the pixels, whatever else the file contains."""
    from PIL import Image

    with Image.open(picture) as opened:
        clean = Image.new("RGB", opened.size)
        clean.paste(opened.convert("RGB"))
    clean.save(target)


def _check_replaced(repository: Repository, names: Sequence[str], *, overwrite: bool) -> None:
    replaced = sorted(repository.files & set(names))
    if not replaced:
        return
    if not overwrite:
        raise InputError(
            f"--repo {repository.name}: it already has {', '.join(replaced)}",
            "--overwrite replaces them in a new commit if the model card was written by pdd.",
        )
    if not repository.is_own:
        raise InputError(
            f"--repo {repository.name}: its model card was not written by pdd, so {', '.join(replaced)} "
            "would be replaced in someone else's repository",
            "Choose another repository.",
        )


@contextlib.contextmanager
def _errors(repo: str) -> Iterator[None]:
    """Convert errors of the Hub and of its HTTP client, which differs between releases, to DownloadError."""
    try:
        yield
    except PddError:
        raise
    except Exception as error:
        converted = failure(f"--repo {repo}", error)
        if "answered 401" in converted.message:
            converted.hint = "The token is invalid or expired: run `hf auth login`, or set HF_TOKEN."
        elif "answered 403" in converted.message:
            converted.hint = "The token needs write access, and USER must be you or an organisation of yours."
        raise converted from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Switch off the progress bars of the Hub's client."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
