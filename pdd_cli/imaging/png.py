"""PNG: its chunks, animations, pixels of 16 bits, texts; and the streamed writer."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from pdd_cli.errors import InputError
from pdd_cli.imaging.image import Array, ImageSpec, ImageStream
from pdd_cli.imaging.metadata import Metadata, Notes, Text, dpi_of, photoshop_block
from pdd_cli.imaging.pixels import plain_mode

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND")
_MOST_INFLATED = 64 << 20


@dataclass(frozen=True)
class Chunks:
    """`pixels`: a PNG file of the pixels only. `beside`: (kind, content) of the other chunks, in order.

    `key`: the transparent gray or RGB value of a 16-bit file, which `pixels` lacks. `notes`: problems of chunks that
    were left out.
    """

    pixels: bytes
    beside: tuple[tuple[bytes, bytes], ...]
    key: tuple[int, ...] | None
    notes: tuple[str, ...]

    def first(self, kind: bytes) -> bytes | None:
        """Content of the first chunk of this kind."""
        return next((content for name, content in self.beside if name == kind), None)


def chunk(kind: bytes, content: bytes) -> bytes:
    """Serialise a chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def split(file: BinaryIO, *, whole: bool = True) -> Chunks:
    """Split a file that begins with the SIGNATURE into chunks; data after its end is ignored.

    Damaged metadata is noted, damaged pixels raise ValueError. Unless `whole`, the pixel data are skipped.
    """
    pixels, beside, notes = [file.read(len(SIGNATURE))], [], []
    kind, bits, colour, key, cut = b"", 0, 0, None, False
    while kind != b"IEND" and len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in (b"IDAT", b"fdAT") and not whole:
            file.seek(length + 4, 1)
            pixels += [chunk(kind, b"")] if kind == b"IDAT" else []
            continue
        content, checksum = file.read(length), file.read(4)
        cut = len(checksum) < 4
        sound = not cut and zlib.crc32(kind + content) == int.from_bytes(checksum, "big")
        name = ascii(kind.decode("latin-1"))
        if kind in _PIXELS:
            if not sound and not cut:
                raise ValueError(f"the checksum of its {name} chunk is wrong")
            if kind == b"IHDR" and len(content) >= 10:
                bits, colour = content[8], content[9]
            if kind == b"tRNS" and bits == 16 and colour in (0, 2) and len(content) >= colour + 2:
                key = struct.unpack_from(f">{colour + 1}H", content)
                continue
            pixels.append(head + content + checksum)
        elif not sound:
            notes.append(f"its {name} chunk is damaged and left out")
        elif kind[0] & 0x20:
            beside.append((kind, content))
        else:
            raise ValueError(f"an unknown chunk {name}")
    if kind != b"IEND" or cut:
        notes.append("its end mark is missing")
        pixels.append(chunk(b"IEND", b""))
    return Chunks(b"".join(pixels), tuple(beside), key, tuple(notes))


def inflate(content: bytes) -> bytes:
    """Decompress with zlib. Raises ValueError for a decompression bomb, zlib.error."""
    stream = zlib.decompressobj()
    found = stream.decompress(content, _MOST_INFLATED)
    if stream.unconsumed_tail or not stream.eof:
        raise ValueError("a decompression bomb, or cut short")
    return found


@dataclass(frozen=True)
class Frame:
    """A stored frame of an animation: `file`, a PNG, and its position on the canvas.

    `is_over`: blended over the canvas, else it replaces it. `disposal` of its rectangle before the next frame: 0 keep,
    1 clear, 2 restore. `duration` in milliseconds.
    """

    file: bytes
    left: int
    top: int
    width: int
    height: int
    disposal: int
    is_over: bool
    duration: float


def frames(pixels: bytes) -> Iterator[Frame]:
    """The frames of an animated PNG (PNG, third edition, 11.3.7), without a default image outside the animation."""
    at = len(SIGNATURE)
    header, shared, control, content = b"", b"", b"", b""
    while at + 8 <= len(pixels):
        length, kind = int.from_bytes(pixels[at : at + 4], "big"), pixels[at + 4 : at + 8]
        body = pixels[at + 8 : at + 8 + length]
        at += 12 + length
        match kind:
            case b"IHDR":
                header = body
            case b"PLTE" | b"tRNS":
                shared += chunk(kind, body)
            case b"IDAT":
                content += body if control else b""
            case b"fdAT":
                content += body[4:]
            case b"fcTL" | b"IEND":
                if control:
                    _, width, height, left, top, delay, unit, disposal, blending = struct.unpack(">5I2H2B", control)
                    start = SIGNATURE + chunk(b"IHDR", control[4:12] + header[8:]) + shared
                    file = start + chunk(b"IDAT", content) + chunk(b"IEND", b"")
                    yield Frame(file, left, top, width, height, disposal, blending == 1, 1000 * delay / (unit or 100))
                control, content = body, b""


def play_frames(pixels: bytes, size: tuple[int, int]) -> Iterator[tuple[Array, float]]:
    """The displayed frames of an animated PNG, (H, W, 3) or with alpha (H, W, 4), and their durations.

    Pillow blends alpha like a colour, which makes holes, and doesn't restore the canvas below the first frame.
    """
    stored = list(frames(pixels))
    canvas = Image.new("RGBA", size)
    with_alpha = any(frame.disposal == 1 for frame in stored[:-1])
    for frame in stored:
        if frame.left + frame.width > size[0] or frame.top + frame.height > size[1]:
            raise ValueError("a frame that is larger than the image")
        with Image.open(io.BytesIO(frame.file), formats=("PNG",)) as image:
            plain = plain_mode(image)[0]
            with_alpha = with_alpha or plain.mode in ("LA", "RGBA")
            if plain.mode == "I;16":
                plain = Image.fromarray((np.asarray(plain) >> 8).astype(np.uint8))
            colours = plain.convert("RGBA")
        before, place = canvas.copy(), (frame.left, frame.top)
        if frame.is_over:
            canvas.alpha_composite(colours, place)
        else:
            canvas.paste(colours, place)
        yield np.asarray(canvas if with_alpha else canvas.convert("RGB")), frame.duration
        if frame.disposal == 1:
            canvas.paste((0, 0, 0, 0), (*place, frame.left + frame.width, frame.top + frame.height))
        elif frame.disposal == 2:
            canvas = before
    raise ValueError("fewer frames than it announces")


def decode_png16(chunks: Chunks) -> Array:
    """Decode 16 bits of several channels, which Pillow reduces to 8, to (H, W, C), alpha last."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # OpenCV prints problems of damaged files
    decoded = cv2.imdecode(np.frombuffer(chunks.pixels, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
        raise ValueError("16-bit pixels that can't be decoded")
    is_gray = chunks.pixels[25] == 4
    order = (0, decoded.shape[2] - 1) if is_gray else (2, 1, 0, 3)[: decoded.shape[2]]
    return with_key(decoded[:, :, order], chunks.key)


def with_key(channels: Array, key: tuple[int, ...] | None) -> Array:
    """Add alpha to (H, W) or (H, W, C) of 16 bits if one value is transparent."""
    if key is None or channels.dtype != np.uint16:
        return channels
    channels = channels.reshape(*channels.shape[:2], -1)
    clear = (channels == np.array(key, np.uint16)).all(axis=2)
    return np.dstack([channels, np.where(clear, 0, 65535).astype(np.uint16)])


def read_profile(chunks: Chunks, notes: Notes) -> tuple[object, Notes]:
    content = chunks.first(b"iCCP")
    try:
        return (None if content is None else inflate(content[content.index(b"\0") + 2 :])), notes
    except (ValueError, zlib.error):
        return None, (*notes, "its colour profile is damaged and left out")


_COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"mDCV", b"cLLI", b"mDCv", b"cLLi")

# Chunks that are read, and chunks that describe the old pixels only.
_READ_CHUNKS = (b"iCCP", b"cICP", b"pHYs", b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_STALE_CHUNKS = (b"bKGD", b"tIME", b"sBIT", b"hIST", b"vpAg", b"orNT", b"caNv")
_KNOWN_CHUNKS = (*_COLOUR_CHUNKS, *_READ_CHUNKS, *_STALE_CHUNKS)
XMP_KEYWORD, _IPTC_PROFILES = "XML:com.adobe.xmp", ("Raw profile type iptc", "Raw profile type 8bim")
EXIF_PROFILES = ("Raw profile type exif", "Raw profile type APP1")
_STALE_TEXTS = ("Thumb::", "Raw profile type", XMP_KEYWORD)
_PHOTOSHOP_IPTC = b"8BIM\x04\x04"


def with_chunks(metadata: Metadata, chunks: Chunks) -> tuple[Metadata, Notes]:
    texts, notes = read_texts(chunks)
    raw = {text.keyword: text.text for text in texts}
    iptc = next((raw_profile(raw[name]) for name in _IPTC_PROFILES if name in raw), None)
    if iptc is not None and iptc.startswith(_PHOTOSHOP_IPTC):
        iptc = iptc[12 : 12 + int.from_bytes(iptc[8:12], "big")]
    lost = [f"PNG chunk {kind.decode('latin-1')!a}" for kind, _ in chunks.beside if kind not in _KNOWN_CHUNKS]
    lost = ["Content Credentials" if "caBX" in name else name for name in lost]
    physical, cicp = chunks.first(b"pHYs"), chunks.first(b"cICP")
    dpi = metadata.dpi
    if physical is not None and len(physical) == 9:
        x, y, unit = struct.unpack(">IIB", physical)
        dpi = dpi_of([x * 0.0254, y * 0.0254]) if unit == 1 else dpi
        lost += ["shape of the pixels (pHYs)"] if unit == 0 and x != y else []
    text = tuple(text for text in texts if not text.keyword.startswith(_STALE_TEXTS))
    colour = tuple((kind, content) for kind, content in chunks.beside if kind in _COLOUR_CHUNKS)
    metadata = replace(
        metadata,
        iptc=iptc,
        dpi=dpi,
        text=text,
        colour=colour,
        cicp=(cicp[0], cicp[1], cicp[2], cicp[3]) if cicp and len(cicp) == 4 else None,
        lost=(*metadata.lost, *lost),
    )
    return metadata, (*chunks.notes, *notes)


def read_texts(chunks: Chunks) -> tuple[list[Text], Notes]:
    found, notes = [], []
    for kind, content in chunks.beside:
        try:
            if kind == b"tEXt":
                keyword, text = content.split(b"\0", 1)
                found.append(Text(keyword.decode("latin-1"), text.decode("latin-1")))
            elif kind == b"zTXt":
                keyword, text = content.split(b"\0", 1)
                found.append(Text(keyword.decode("latin-1"), inflate(text[1:]).decode("latin-1")))
            elif kind == b"iTXt":
                keyword, rest = content.split(b"\0", 1)
                language, translated, text = rest[2:].split(b"\0", 2)
                text = inflate(text) if rest[0] else text
                found.append(
                    Text(keyword.decode("latin-1"), text.decode(), language.decode("latin-1"), translated.decode())
                )
        except (ValueError, IndexError, zlib.error):
            notes.append(f"its {kind.decode()!a} chunk is damaged and left out")
    return found, tuple(notes)


def raw_profile(text: str) -> bytes | None:
    """Decode ImageMagick's profile in a PNG text: lines of a name, a length and hexadecimal digits."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return None


# Rows that are filtered at once, and values that are computed at once: they fit the CPU's cache.
_ROWS = 16
_LONG_TEXT = 1024  # minimum bytes of a text that is compressed


def write_png(file: BinaryIO, streams: Iterator[ImageStream], count: int) -> None:
    """Write a PNG of 8 or 16 bits, with several streams an animation. Pillow has no 16-bit RGB and isn't streamed."""
    sequence = itertools.count()
    first: ImageSpec | None = None
    for stream in streams:
        spec = stream.spec
        if first is None:
            first = spec
            colour = {1: 0, 2: 4, 3: 2, 4: 6}[spec.samples]
            file.write(SIGNATURE)
            header = struct.pack(">IIBBBBB", spec.width, spec.height, spec.bits, colour, 0, 0, 0)
            file.write(chunk(b"IHDR", header))
            if count > 1:
                file.write(chunk(b"acTL", struct.pack(">II", count, stream.metadata.plays)))
            for kind, content in _metadata_chunks(stream.metadata):
                file.write(chunk(kind, content))
        elif spec != first:
            raise InputError("pages of different sizes or kinds can't be frames of one PNG", "Use --format tiff.")
        if count > 1:
            # The frame replaces the whole canvas.
            shown = round(stream.duration or 0)
            delay = (shown, 1000) if shown < 65536 else (min(65535, round(shown / 1000)), 1)
            control = struct.pack(">IIIIIHHBB", next(sequence), spec.width, spec.height, 0, 0, *delay, 0, 0)
            file.write(chunk(b"fcTL", control))
        for data in _compressed_rows(stream):
            if spec is first:
                file.write(chunk(b"IDAT", data))
            else:
                file.write(chunk(b"fdAT", struct.pack(">I", next(sequence)) + data))
    file.write(chunk(b"IEND", b""))


def _metadata_chunks(metadata: Metadata) -> Iterator[tuple[bytes, bytes]]:
    """The metadata as chunks (kind, content)."""
    if metadata.cicp:
        yield b"cICP", bytes(metadata.cicp)
    if metadata.icc:
        yield b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc)
    yield from metadata.colour
    if metadata.dpi:
        yield b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in metadata.dpi), 1)
    if metadata.exif:
        yield b"eXIf", metadata.exif.removeprefix(b"Exif\0\0")
    if metadata.xmp:
        yield b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp
    if metadata.iptc:
        # The same as ImageMagick and exiftool.
        block = photoshop_block(metadata.iptc)
        yield b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(f"\niptc\n{len(block):8}\n{block.hex()}\n".encode())
    texts = metadata.text
    if metadata.comment:
        texts += (Text("Comment", metadata.comment.decode("utf-8", "replace")),)
    if metadata.software:
        texts += (Text("Software", metadata.software),)
    for text in texts:
        yield _text_chunk(text)


def _text_chunk(text: Text) -> tuple[bytes, bytes]:
    keyword = text.keyword.encode("latin-1") + b"\0"
    try:
        plain = None if text.language is not None else text.text.encode("latin-1")
    except UnicodeEncodeError:
        plain = None
    if plain is None:
        content = text.text.encode()
        packed = len(content) > _LONG_TEXT
        places = f"{text.language or ''}\0{text.translated}\0".encode()
        return b"iTXt", keyword + bytes([packed, 0]) + places + (zlib.compress(content) if packed else content)
    if len(plain) > _LONG_TEXT:
        return b"zTXt", keyword + b"\0" + zlib.compress(plain)
    return b"tEXt", keyword + plain


def _compressed_rows(stream: ImageStream) -> Iterator[bytes]:
    """Filter and compress the rows."""
    spec = stream.spec
    # Filtered photographs have few repetitions. A search for them takes ten times as long, and the short matches make
    # the file larger.
    compressor = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    above = np.zeros(spec.width * spec.samples * spec.bits // 8, np.uint8)
    for rows in stream.row_chunks:
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].astype(f">u{spec.bits // 8}")
            values = part.view(np.uint8).reshape(-1, len(above))
            data = compressor.compress(_filtered(values, above, spec.samples * spec.bits // 8).tobytes())
            above = values[-1]
            if data:
                yield data
    yield compressor.flush()


def _filtered(rows: Array, above: Array, step: int) -> Array:
    """Filter rows (n, bytes) below the row `above` by the PNG filter with the smallest differences: (n, 1 + bytes).

    `step`: bytes per pixel. PNG specification, section 9, with its recommended heuristic.
    """
    up = np.vstack([above, rows[:-1]])
    left, corner = np.zeros_like(rows), np.zeros_like(rows)
    left[:, step:], corner[:, step:] = rows[:, :-step], up[:, :-step]
    # 8 bits throughout, which a CPU computes 64 at a time. Paeth: if left and up differ from the corner in the same
    # direction, |left + up - 2 corner| is the sum of both differences, and larger than either.
    to_left, to_up = _distance(up, corner), _distance(left, corner)
    to_corner = _distance(to_left, to_up) | _mask((left > corner) == (up > corner))
    is_left = _mask((to_left <= to_up) & (to_left <= to_corner))
    is_up = _mask(to_up <= to_corner)
    paeth = (left & is_left) | (((up & is_up) | (corner & ~is_up)) & ~is_left)
    mean = (left & up) + ((left ^ up) >> 1)
    candidates = np.stack([rows, rows - left, rows - up, rows - mean, rows - paeth])
    cost = np.minimum(candidates, -candidates).sum(axis=2, dtype=np.uint32)
    best = cost.argmin(axis=0)
    return np.hstack([best[:, None].astype(np.uint8), candidates[best, np.arange(len(rows))]])


def _distance(a: Array, b: Array) -> Array:
    distance: Array = np.maximum(a, b) - np.minimum(a, b)
    return distance


def _mask(condition: npt.NDArray[np.bool_]) -> Array:
    """255 where the condition holds, else 0."""
    mask: Array = -condition.view(np.uint8)
    return mask
