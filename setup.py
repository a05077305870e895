"""Packages and version; everything declarative is in pyproject.toml.

`kernels/` stands at the top of the checkout but is installed as `mixflow_fast.kernels`: a public
distribution owns the name `kernels`. It must not get an `__init__.py`, or the checkout's folder
would hide that distribution from everyone who runs inside it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """`__version__` of mixflow_fast, read as text: importing it would need torch."""
    text = (ROOT / "mixflow_fast" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('mixflow_fast/__init__.py must hold a line __version__ = "X.Y.Z"')
    return match.group(1)


setup(
    version=read_version(),
    packages=[*find_packages(include=["mixflow_fast", "mixflow_fast.*"]), "mixflow_fast.kernels"],
    package_dir={"mixflow_fast": "mixflow_fast", "mixflow_fast.kernels": "kernels"},
    package_data={"mixflow_fast": ["recipes/*.yaml"]},
    include_package_data=False,
)
