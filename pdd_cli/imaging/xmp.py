"""XMP for an output: for the upright image and its new size, without references to data that outputs don't contain."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from xml.dom import minidom
from xml.parsers.expat import ExpatError

_TIFF, _EXIF = "http://ns.adobe.com/tiff/1.0/", "http://ns.adobe.com/exif/1.0/"
_PANORAMA = "http://ns.google.com/photos/1.0/panorama/"
_DIMENSIONS, _AREA = "http://ns.adobe.com/xap/1.0/sType/Dimensions#", "http://ns.adobe.com/xmp/sType/Area#"
_MICROSOFT = "http://ns.microsoft.com/photo/1.2/t/Region#"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_DECLARATIONS = "http://www.w3.org/2000/xmlns/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_CAMERA = "http://ns.google.com/photos/1.0/camera/"
# Properties to remove: namespace, beginning of the name ("" for any name), and the name for messages ("" for none).
_GONE = (
    ("http://ns.adobe.com/hdr-gain-map/1.0/", "", "HDR gain map"),
    ("http://ns.apple.com/HDRGainMap/1.0/", "", "HDR gain map"),
    ("http://ns.google.com/photos/1.0/container/", "Directory", ""),
    ("http://ns.google.com/photos/dd/1.0/device/", "Container", ""),
    (_CAMERA, "MotionPhoto", "video of a motion photo"),
    (_CAMERA, "MicroVideo", "video of a motion photo"),
    ("http://ns.adobe.com/xmp/note/", "HasExtendedXMP", "extended XMP"),
    ("http://ns.adobe.com/xap/1.0/", "Thumbnails", ""),
    (_EXIF, "SubjectArea", "subject area"),
    (_EXIF, "SubjectLocation", "subject area"),
)
_SIZES = {
    (_TIFF, "ImageWidth"): 0,
    (_TIFF, "ImageLength"): 1,
    (_EXIF, "PixelXDimension"): 0,
    (_EXIF, "PixelYDimension"): 1,
}
_PIXELS = {
    (_PANORAMA, "FullPanoWidthPixels"): 0,
    (_PANORAMA, "FullPanoHeightPixels"): 1,
    (_PANORAMA, "CroppedAreaImageWidthPixels"): 0,
    (_PANORAMA, "CroppedAreaImageHeightPixels"): 1,
    (_PANORAMA, "CroppedAreaLeftPixels"): 0,
    (_PANORAMA, "CroppedAreaTopPixels"): 1,
}
_PIXEL_STRUCTURES = (
    # namespace, name of the unit, axis (0: x, 1: y) of each value
    (_DIMENSIONS, "unit", {"w": 0, "h": 1}),
    (_AREA, "unit", {"x": 0, "w": 0, "d": 0, "y": 1, "h": 1}),
    (_IPTC, "rbUnit", {"rbX": 0, "rbW": 0, "rbRx": 0, "rbY": 1, "rbH": 1}),
)
# XML parsers read an unescaped tab or line end in an attribute as a space, and minidom may write them unescaped.
# `serialised` uses these private characters until it escapes them.
_ATTRIBUTE_WHITESPACE = {"\t": "\ue009", "\n": "\ue00a", "\r": "\ue00d"}
_PACKET = re.compile(r"^\s*(<\?xpacket begin.*?\?>)?(.*?)(<\?xpacket end.*?\?>)?\s*$", re.DOTALL)


class _Value:
    """A property with a simple value: an attribute or an element."""

    def __init__(self, parent: Any, node: Any) -> None:
        self._parent, self._node = parent, node

    @property
    def key(self) -> tuple[str, str]:
        return self._node.namespaceURI or "", self._node.localName

    @property
    def text(self) -> str:
        if self._node.nodeType == self._node.ATTRIBUTE_NODE:
            return str(self._node.value)
        return "".join(child.data for child in self._node.childNodes if child.nodeType == child.TEXT_NODE)

    @text.setter
    def text(self, text: str) -> None:
        if self._node.nodeType == self._node.ATTRIBUTE_NODE:
            self._node.value = text
            return
        for child in list(self._node.childNodes):
            self._node.removeChild(child)
        self._node.appendChild(self._node.ownerDocument.createTextNode(text))

    def scale(self, factor: float, *, whole: bool) -> None:
        """Multiply the number by `factor`. A value that isn't a number is unchanged."""
        try:
            value = float(self.text) * factor
        except ValueError:
            return
        self.text = str(round(value)) if whole else f"{value:.6g}"

    def remove(self) -> None:
        if self._node.nodeType == self._node.ATTRIBUTE_NODE:
            self._parent.removeAttributeNode(self._node)
        else:
            self._parent.removeChild(self._node)


def upright(packet: bytes, orientation: int, size: tuple[int, int]) -> tuple[bytes | None, tuple[str, ...]]:
    """The XMP `packet` for the pixels in upright position, and the names of the data that is removed.

    Args:
        packet: An XMP packet in UTF-8 or UTF-16.
        orientation: The EXIF orientation of the stored pixels, 1 to 8.
        size: (width, height) of the upright image.

    Returns:
        The packet, None if it isn't valid XML, and the names.
    """
    lost: list[str] = []

    def change(document: Any) -> None:
        for value in list(_values(document)):
            namespace, name = value.key
            for gone, prefix, called in _GONE:
                declares = namespace == _DECLARATIONS and not prefix and value.text == gone
                if declares or (namespace == gone and name.startswith(prefix)):
                    value.remove()
                    lost.append(called)
            if value.key == (_TIFF, "Orientation"):
                value.text = "1"
            if value.key in _SIZES:
                value.text = str(size[_SIZES[value.key]])
            if orientation != 1 and value.key == (_MICROSOFT, "Rectangle"):
                value.text = _turned_rectangle(value.text, orientation)
            if orientation != 1 and value.key == (_IPTC, "ImageRegion"):
                value.remove()
                lost.append("IPTC image regions")
        for structure in _structures(document) if orientation != 1 else ():
            _turn(structure, orientation)

    try:
        return _changed(packet, change), tuple(name for name in dict.fromkeys(lost) if name)
    except (ExpatError, ValueError, UnicodeError):
        return None, ("damaged XMP",)


def resized(packet: bytes, size: tuple[int, int], factors: tuple[float, float]) -> bytes:
    """The `packet` of an upright image for its new (width, height) `size`; `factors` are new size / old size by axis.

    Raises ExpatError, ValueError or UnicodeError if the packet is damaged.
    """

    def change(document: Any) -> None:
        for value in list(_values(document)):
            if value.key in _SIZES:
                value.text = str(size[_SIZES[value.key]])
            elif value.key in _PIXELS:
                value.scale(factors[_PIXELS[value.key]], whole=True)
        for structure in _structures(document):
            for namespace, unit, axes in _PIXEL_STRUCTURES:
                if (namespace, unit) in structure and structure[namespace, unit].text == "pixel":
                    for name, axis in axes.items():
                        if (namespace, name) in structure:
                            structure[namespace, name].scale(factors[axis], whole=namespace == _DIMENSIONS)

    return _changed(packet, change)


def _changed(packet: bytes, change: Callable[[Any], None]) -> bytes:
    """Parse `packet`, apply `change` to the document, and write it again.

    Raises ExpatError, ValueError or UnicodeError if the packet is damaged.
    """
    encoding = next(
        (name for mark, name in ((b"\xfe\xff", "utf-16"), (b"\xff\xfe", "utf-16")) if mark in packet[:2]), ""
    )
    text = packet.rstrip(b"\0").decode(encoding or "utf-8-sig")
    match = _PACKET.match(text)
    assert match is not None
    begin, body, end = match.groups()
    if "<!DOCTYPE" in body or "<!ENTITY" in body:
        raise ValueError("XMP must not contain a document type")
    document = minidom.parseString(body.strip().encode())
    change(document)
    return (begin or "").encode() + serialised(document) + (end or "").encode()


def serialised(document: minidom.Document) -> bytes:
    """The document as XML. Tabs and line ends in attributes are escaped, so that parsers keep them."""
    for element in document.getElementsByTagName("*"):
        for attribute in element.attributes.values():
            for character, stand_in in _ATTRIBUTE_WHITESPACE.items():
                attribute.value = attribute.value.replace(character, stand_in)
    text = "".join(node.toxml() for node in document.childNodes)
    for character, stand_in in _ATTRIBUTE_WHITESPACE.items():
        text = text.replace(stand_in, f"&#{ord(character)};")
    return text.encode()


def _elements(node: Any) -> Iterator[Any]:
    for child in list(node.childNodes):
        if child.nodeType == child.ELEMENT_NODE:
            yield child
            yield from _elements(child)


def _values(document: Any) -> Iterator[_Value]:
    for element in _elements(document):
        if element.namespaceURI != _RDF:
            yield _Value(element.parentNode, element)
        for attribute in list(element.attributes.values()):
            yield _Value(element, attribute)


def _structures(document: Any) -> Iterator[dict[tuple[str, str], _Value]]:
    """The properties of each element, by namespace and name: its attributes and its direct children."""
    for element in _elements(document):
        values = [_Value(element, attribute) for attribute in element.attributes.values()]
        values += [_Value(element, child) for child in element.childNodes if child.nodeType == child.ELEMENT_NODE]
        yield {value.key: value for value in values}


def _turn(structure: dict[tuple[str, str], _Value], orientation: int) -> None:
    """Turn an MWG region, whose x and y are its centre in 0..1. A quarter turn exchanges width and height."""
    for namespace, first, second in ((_AREA, "w", "h"), (_DIMENSIONS, "w", "h")):
        if orientation in (5, 6, 7, 8) and {(namespace, first), (namespace, second)} <= structure.keys():
            a, b = structure[namespace, first], structure[namespace, second]
            a.text, b.text = b.text, a.text
    if {(_AREA, "x"), (_AREA, "y")} <= structure.keys():
        x, y = structure[_AREA, "x"], structure[_AREA, "y"]
        try:
            turned = _turned_point(float(x.text), float(y.text), orientation)
        except ValueError:
            return
        x.text, y.text = (f"{value:.6g}" for value in turned)


def _turned_point(x: float, y: float, orientation: int) -> tuple[float, float]:
    """The position in the upright image, in 0..1, of a point of the stored image."""
    return {
        2: (1 - x, y),
        3: (1 - x, 1 - y),
        4: (x, 1 - y),
        5: (y, x),
        6: (1 - y, x),
        7: (1 - y, 1 - x),
        8: (y, 1 - x),
    }.get(orientation, (x, y))


def _turned_rectangle(text: str, orientation: int) -> str:
    """Turn a rectangle "x, y, width, height" in 0..1, where x and y are the top left corner."""
    try:
        x, y, width, height = (float(value) for value in text.split(","))
    except ValueError:
        return text
    a, b = _turned_point(x, y, orientation), _turned_point(x + width, y + height, orientation)
    left, top = min(a[0], b[0]), min(a[1], b[1])
    return ", ".join(f"{value:.6g}" for value in (left, top, abs(a[0] - b[0]), abs(a[1] - b[1])))
