"""Fingerprints of published bases that ship with the package, as `inspect BASE --fingerprint FILE` writes them.

The table is empty: nobody has recorded one from weights whose checksums are the published ones. A row is the path of a file beside this
one, and where it came from.
"""

from __future__ import annotations

from pathlib import Path

FINGERPRINTS: tuple[tuple[Path, str], ...] = ()
