"""Refuses to install from a checkout that lost its symbolic links; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

if not (Path(__file__).parent / "edgefg" / "export" / "__init__.py").is_file():
    raise SystemExit(
        "edgefg/export is not a link to export/: this checkout lost its symbolic links."
        " Clone the repository with git (on Windows with core.symlinks=true and developer mode)."
    )
setup()
