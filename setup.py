"""Packages are found on disk, _build/native.py compiles the extension: a new op needs no edit here."""

import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup

if int(setuptools.__version__.partition(".")[0]) < 77:  # without build isolation it is whichever is installed
    raise SystemExit(f"setuptools 77 or later is needed, found {setuptools.__version__}: pip install -U setuptools")

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "_build"))

from native import BuildNative  # noqa: E402  (found through the line above)

# The import name of each source folder. Never import the folder's own name: that would be a second copy.
FOLDERS = {"transformer": "fused_transformer", "kernels": "fused_transformer.kernels"}


def packages():
    for folder, name in FOLDERS.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            yield ".".join([name, *init.parent.relative_to(ROOT / folder).parts])


setup(
    packages=list(packages()),
    package_dir={name: folder for folder, name in FOLDERS.items()},
    package_data={"fused_transformer": ["py.typed"], "fused_transformer.show": ["heads.html", "heads.css", "heads.js"]},
    ext_modules=[
        Extension("fused_transformer.kernels._C", []),
        Extension("fused_transformer.kernels._torch", [], optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
)
