"""What every section of a report is made of."""

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["image", "listed", "section"]


def section(title: str, content: str) -> str:
    """A section with a heading; nothing where it has no content."""
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def image(content: bytes, kind: str, what: str) -> str:
    """A picture in the page itself. kind: as in image/<kind>."""
    data = b64encode(content).decode()
    return f'<img alt="{escape(what)}" src="data:image/{kind};base64,{data}">'
