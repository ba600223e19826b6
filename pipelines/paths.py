"""Where a path of a configuration points to."""

from pathlib import Path

__all__ = ["find_path"]


def find_path(path: str) -> str:
    """A path below the current directory or below the checkout; anything else is left as it is."""
    checkout = Path(__file__).resolve().parent.parent
    for root in (Path.cwd(), checkout):
        if (root / path).exists():
            return str(root / path)
    return path
