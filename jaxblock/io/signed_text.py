"""Signs a text that we write and users may edit, so that an edited text can be told from one that is as we wrote it."""

from __future__ import annotations

import hashlib
import re

_SIGNATURE = re.compile(rb"\n<!-- written by jaxblock; SHA-256 of the text above: ([0-9a-f]{64}) -->\n?\Z")


def signed(text: str) -> str:
    """Returns a text of Markdown or HTML with a last line, a comment, that holds its hash.

    Args:
        text: the text; it ends with a newline.
    """
    return f"{text}\n<!-- written by jaxblock; SHA-256 of the text above: {_hash(text.encode())} -->\n"


def is_signed(content: bytes) -> bool:
    """Tells whether we wrote a text, which may have been edited since."""
    return _SIGNATURE.search(_unix(content)) is not None


def is_unedited(content: bytes) -> bool:
    """Tells whether we wrote a text and nobody edited it; another kind of line ends is no edit."""
    content = _unix(content)
    found = _SIGNATURE.search(content)
    return found is not None and _hash(content[: found.start()]) == found[1].decode()


def unsigned(content: bytes) -> str:
    """Returns the text without its signature.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return _SIGNATURE.sub(b"", _unix(content)).decode("utf-8")


def _unix(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
