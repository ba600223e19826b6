"""The files that a local model is read from: what its outputs depend on."""

import os
from pathlib import Path

__all__ = ["files_of"]

# beside a model's files, but nothing that its outputs depend on: cards, pictures, tasks
UNREAD = {".md", ".png", ".jpg", ".gif", ".mp4", ".jsonl"}


def files_of(path: str) -> list[tuple[str, int, int]] | str:
    """Name, size and time of every file that a local model is read from; a hub name stands for
    itself.
    """
    if not os.path.isdir(path):
        return path
    found = sorted(p for p in Path(path).rglob("*") if p.is_file() and p.suffix not in UNREAD)
    return [(str(p.relative_to(path)), p.stat().st_size, int(p.stat().st_mtime)) for p in found]
