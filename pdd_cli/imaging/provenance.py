"""Provenance: each output records that pdd made it, so that pdd recognises its own files.

The record is in EXIF or TIFF `Software` and in XMP (digital source type, history, and properties in pdd's namespace).
BMP supports neither and gets a line of text after its pixels. The record contains a seal: the SHA-256 of the file
without the seal. If another program changes the file, pdd no longer recognises it, even if the metadata is kept.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from xml.dom import minidom
from xml.parsers.expat import ExpatError
from xml.sax.saxutils import escape, quoteattr

from pdd_cli.imaging.metadata import exif_bytes, load_exif
from pdd_cli.imaging.xmp import serialised
from pdd_cli.version import __version__

SOFTWARE = f"pdd {__version__}"
DEFAULTS = "defaults"
"""`Provenance.options` if none is given."""

_SEAL = b"pdd-seal-"
_DIGITS = 64
_UNSEALED = "0" * _DIGITS
_BLOCK = 1 << 20
# The digest of the source is at most this many bytes from the seal, also if another program has rewritten the XMP.
_AROUND = 1000
_SOURCE = re.compile(rb"(?:SourceSHA256(?:=[\"']|>)|source sha256 )([0-9a-f]{64})")
_WEIGHTS = re.compile(rb"(?:ModelSHA256(?:=[\"']|>)|\(weights sha256 )([0-9a-f]{64})")
_OPTIONS = re.compile(rb":Options(?:=[\"']|>)([^\"'<]*)|; options (.{,500}?); source sha256 ")
_SOFTWARE_TAG = 0x0131
_PNG = b"\x89PNG\r\n\x1a\n"
_ZIP = b"PK\x03\x04"

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_NAMESPACES = {
    "rdf": _RDF,
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "stEvt": "http://ns.adobe.com/xap/1.0/sType/ResourceEvent#",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "pdd": "urn:pdd-cli:provenance",
}
_EMPTY_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}"/></x:xmpmeta><?xpacket end="w"?>'
)
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# Source types of generated images. They are kept: an upscaled generated image is still a generated one.
_GENERATED = ("rainedAlgorithmicMedia", "algorithmicMedia", "compositeSynthetic", "virtualRecording", "dataDriven")


@dataclass(frozen=True)
class Provenance:
    """How an output was made.

    Attributes:
        model: Name of the weights.
        sha256: SHA-256 of the weights file.
        how: The settings, as text.
        source_sha256: SHA-256 of the input file.
        options: The options that determine the output, as on the command line, in ASCII; "" if unknown.
    """

    model: str
    sha256: str
    how: str = ""
    source_sha256: str = ""
    options: str = ""

    def __str__(self) -> str:
        how = f", {self.how}" if self.how else ""
        return f"{SOFTWARE}: upscaled with {self.model}{how} (weights sha256 {self.sha256})"


def sealed_text(made: Provenance) -> str:
    """The record as one line, for files and containers that hold plain text. Call `seal` when the file is complete."""
    options = f"; options {made.options}" if made.options else ""
    return f"{made}{options}; source sha256 {made.source_sha256}; {_SEAL.decode()}{_UNSEALED}"


def stamped_exif(exif: bytes | None, made: Provenance) -> tuple[bytes, str | None]:
    """Set the Software tag of `exif`, which begins with "Exif\\0\\0". Returns it, and the previous Software if any."""
    tags = load_exif(exif)
    before = tags.get(_SOFTWARE_TAG)
    tags[_SOFTWARE_TAG] = str(made)
    return exif_bytes(tags), before.strip("\0 ") if isinstance(before, str) else None


def stamped_xmp(xmp: bytes | None, made: Provenance, software: str | None) -> bytes | None:
    """Add the record to `xmp`. Its other properties are kept. Data that isn't valid XMP is returned unchanged.

    Args:
        xmp: The XMP packet of the input, None if it has none.
        made: How the output was made.
        software: The previous EXIF Software, which is added to the history.
    """
    try:
        document = minidom.parseString(xmp.rstrip(b"\0 \r\n") if xmp else _EMPTY_XMP.encode())
        root = document.getElementsByTagNameNS(_RDF, "RDF")[0]
    except (ExpatError, IndexError, ValueError):
        return xmp
    known = document.toxml()
    for prefix, space in _NAMESPACES.items():
        if root.getAttribute(f"xmlns:{prefix}") not in ("", space):
            return xmp
        root.setAttribute(f"xmlns:{prefix}", space)
    before = _take(root, "Iptc4xmpExt", "DigitalSourceType")
    for element in root.getElementsByTagNameNS(_RDF, "Description"):
        for name in [name for uri, name in element.attributes.keysNS() if uri == _NAMESPACES["pdd"]]:
            element.removeAttributeNS(_NAMESPACES["pdd"], name)
    source_type = before if any(kind in before for kind in _GENERATED) else f"{_SOURCE_TYPES}algorithmicallyEnhanced"
    attributes = {
        "Iptc4xmpExt:DigitalSourceType": source_type,
        "pdd:Version": __version__,
        "pdd:Model": made.model,
        "pdd:ModelSHA256": made.sha256,
        "pdd:Settings": made.how,
        **({"pdd:Options": made.options} if made.options else {}),
        "pdd:SourceSHA256": made.source_sha256,
        "pdd:Seal": f"{_SEAL.decode()}{_UNSEALED}",
    }
    if software and "CreatorTool" not in known:
        attributes["xmp:CreatorTool"] = software
    events = [("edited", SOFTWARE, str(made))]
    if software and not software.startswith("pdd ") and software not in known:
        events.insert(0, ("saved", software, ""))
    entries = "".join(_event(*event) for event in events)
    histories = root.getElementsByTagNameNS(_NAMESPACES["xmpMM"], "History")
    sequences = [found for history in histories for found in history.getElementsByTagNameNS(_RDF, "Seq")]
    if sequences:
        _append(sequences[0], entries)
        entries = ""
    history = entries and f"<xmpMM:History><rdf:Seq>{entries}</rdf:Seq></xmpMM:History>"
    text = " ".join(f"{key}={quoteattr(_plain(value))}" for key, value in attributes.items())
    _append(root, f'<rdf:Description rdf:about="" {text}>{history}</rdf:Description>')
    return serialised(document)


def append_to_bmp(path: Path, made: Provenance) -> None:
    """Append the record to a BMP file, and set the file size in its header."""
    with path.open("rb+") as file:
        file.seek(0, io.SEEK_END)
        file.write(b"\0" + sealed_text(made).encode(errors="replace") + b"\0")
        size = file.tell()
        file.seek(2)
        file.write(struct.pack("<I", size))


def seal(path: Path) -> None:
    """Write the SHA-256 of the file into its placeholder. A file without a placeholder is unchanged."""
    with path.open("rb+") as file:
        for at in _places(file):
            file.seek(at)
            if file.read(_DIGITS) != _UNSEALED.encode():
                continue  # the input's seal, in metadata that was kept
            chunk = _png_chunk(file, at)
            digest = _digest(file, at, chunk)
            file.seek(at)
            file.write(digest)
            if chunk is not None:
                start, end = chunk
                file.seek(start)
                crc = zlib.crc32(file.read(end - start))
                file.write(struct.pack(">I", crc))
            return


def made_by_pdd(path: Path) -> bool:
    """Whether pdd made the image or video at `path`, and the file has not been changed since.

    False if the file can't be read, and for outputs made with --strip-metadata: only a manifest lists those.
    """
    try:
        with path.open("rb") as file:
            for at in _places(file):
                file.seek(at)
                if file.read(_DIGITS) == _digest(file, at, _png_chunk(file, at)):
                    return True
    except OSError:
        pass
    return False


def source_of(path: Path) -> str | None:
    """The SHA-256 of the input that the file at `path` was upscaled from. None if the file doesn't contain it."""
    return made_of(path).source


@dataclass(frozen=True)
class Origin:
    """The SHA-256 of the input and of the weights of an output, and its options; None for what it doesn't contain."""

    source: str | None = None
    weights: str | None = None
    options: str | None = None


def made_of(path: Path) -> Origin:
    """What the output at `path` says of its origin."""
    try:
        with path.open("rb") as file:
            for at in _places(file):
                start = max(0, at - _AROUND)
                file.seek(start)
                around = file.read(2 * _AROUND)
                if source := _nearest(_SOURCE, around, at - start):
                    weights, options = (_nearest(pattern, around, at - start) for pattern in (_WEIGHTS, _OPTIONS))
                    return Origin(source, weights, options)
    except OSError:
        pass
    return Origin()


def _nearest(pattern: re.Pattern[bytes], data: bytes, at: int) -> str | None:
    """The group of the match that is nearest to `at`: pages of an archive, just before its comment, have others."""
    found = min(pattern.finditer(data), key=lambda match: abs(match.start() - at), default=None)
    return found[found.lastindex or 0].decode(errors="replace") if found else None


# --- XMP --------------------------------------------------------------------------------------------------------


def _take(root: minidom.Element, prefix: str, name: str) -> str:
    """Remove all occurrences of a property, and return its value; "" if there is none."""
    space, value = _NAMESPACES[prefix], ""
    for element in root.getElementsByTagNameNS(_RDF, "Description"):
        value = element.getAttributeNS(space, name) or value
        if element.hasAttributeNS(space, name):
            element.removeAttributeNS(space, name)
    for element in root.getElementsByTagNameNS(space, name):
        value = "".join(node.data for node in element.childNodes if node.nodeType == node.TEXT_NODE) or value
        value = element.getAttributeNS(_RDF, "resource") or value
        if element.parentNode is not None:
            element.parentNode.removeChild(element)
    return value


def _event(action: str, agent: str, parameters: str) -> str:
    """An entry of the history, with elements instead of attributes, because ImageMagick 6 can't read the latter."""
    values = {"action": action, "softwareAgent": agent, "parameters": parameters}
    content = "".join(f"<stEvt:{key}>{escape(_plain(text))}</stEvt:{key}>" for key, text in values.items() if text)
    return f'<rdf:li rdf:parseType="Resource">{content}</rdf:li>'


def _append(parent: minidom.Element, text: str) -> None:
    """Append the elements in `text` to `parent`, which already declares the namespaces."""
    declared = " ".join(f'xmlns:{prefix}="{space}"' for prefix, space in _NAMESPACES.items())
    wrapper = minidom.parseString(f"<all {declared}>{text}</all>".encode()).documentElement
    assert wrapper is not None
    for element in list(wrapper.childNodes):
        parent.appendChild(element)


def _plain(text: str) -> str:
    """Replace the characters that XML doesn't allow."""
    return re.sub(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


# --- the seal ---------------------------------------------------------------------------------------------------


def _places(file: BinaryIO) -> list[int]:
    """Offsets at which digests begin: after each seal mark. Of a ZIP archive only the last, which is in its comment."""
    found, offset, held = [], 0, b""
    file.seek(0)
    while block := file.read(_BLOCK):
        held += block
        at = held.find(_SEAL)
        while at >= 0:
            found.append(offset + at + len(_SEAL))
            at = held.find(_SEAL, at + 1)
        keep = len(_SEAL) - 1
        offset, held = offset + len(held) - min(keep, len(held)), held[-keep:]
    file.seek(0)
    return found[-1:] if file.read(len(_ZIP)) == _ZIP else found


def _digest(file: BinaryIO, at: int, chunk: tuple[int, int] | None) -> bytes:
    """SHA-256 of the file, as hexadecimal digits, without the digest at `at` and the checksum of its PNG chunk."""
    digest = hashlib.sha256()
    file.seek(0)
    for start, end in [(at, at + _DIGITS), *([(chunk[1], chunk[1] + 4)] if chunk else [])]:
        for block in _blocks(file, start - file.tell()):
            digest.update(block)
        file.seek(end)
    for block in _blocks(file, sys.maxsize):
        digest.update(block)
    return digest.hexdigest().encode()


def _blocks(file: BinaryIO, count: int) -> Iterator[bytes]:
    """The next `count` bytes, or fewer at the end of the file."""
    while count > 0 and (block := file.read(min(count, _BLOCK))):
        yield block
        count -= len(block)


def _png_chunk(file: BinaryIO, at: int) -> tuple[int, int] | None:
    """Offsets of the checksummed data and of the checksum of the PNG chunk that contains `at`. None if not a PNG."""
    file.seek(0)
    if file.read(len(_PNG)) != _PNG:
        return None
    while len(head := file.read(8)) == 8:
        start = file.tell() - 4
        end = start + 4 + int.from_bytes(head[:4], "big")
        if start <= at < end:
            return start, end
        file.seek(end + 4)
    return None
