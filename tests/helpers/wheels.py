"""Wheels for a package index on localhost."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile


def wheel(members: dict[str, bytes], name: str = "tiny_models", version: str = "1.0") -> bytes:
    """The content of a wheel with these files."""
    info = f"{name}-{version}.dist-info"
    members = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in {**members, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(path, content)
    return buffer.getvalue()
