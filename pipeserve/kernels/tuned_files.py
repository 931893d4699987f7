"""Where the measured kernel choices of a card lie. Knows neither torch nor Triton."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE_FOLDER = Path(__file__).parent / "tuned"


class TunedTableError(ValueError):
    """A card's file of measured choices cannot be read; names the file, the fault and the mend."""


def file_stem(card: str) -> str:
    """nvidia-h200 for NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def own_folder(cache_dir: Path) -> Path:
    """Where the user's own measurements lie, which go before the package's."""
    return cache_dir.expanduser() / "tuned"


def find_table(card: str, folder: Path | None) -> Path | None:
    """The card's file in the user's folder, else the package's, or nothing."""
    folders = [PACKAGE_FOLDER] if folder is None else [folder, PACKAGE_FOLDER]
    paths = (each / f"{file_stem(card)}.json" for each in folders)
    return next((path for path in paths if path.is_file()), None)
