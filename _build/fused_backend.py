"""The PEP 517 backend: setuptools', which also asks for NVIDIA's compiler wheels where CUDA is demanded and no
toolkit is installed. Any other install downloads nothing but setuptools and pybind11.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import cuda_toolkit
import settings
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

# All five pinned to one minor version: left to their own requirements, pip pairs nvcc with a newer nvvm, and ptxas
# refuses its PTX.
CUDA_VERSION = "13.0"
CUDA_WHEELS = [
    f"nvidia-{name}=={CUDA_VERSION}.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
]


def _compiler_wheels() -> list[str]:
    if settings.cuda_wanted() != "1" or cuda_toolkit.find_toolkit(with_wheels=False) is not None:
        return []
    # A CUDA_HOME that holds no toolkit is a mistake to report, as the build does, and no reason to download one.
    return [] if cuda_toolkit.named_root() else CUDA_WHEELS


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler_wheels()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler_wheels()


@contextmanager
def _alone() -> Iterator[None]:
    """One build of this tree at a time: two would pack, and delete, each other's files."""
    folder = settings.ROOT / "build"
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, by whatever end
        yield


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with _alone():
        # setuptools adds to what an earlier build left there: a module that has since been deleted would ship again.
        for left in (settings.ROOT / "build").glob("lib*"):
            shutil.rmtree(left)
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with _alone():
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
