"""Builds the CPU kernels: the same C++17 sources once per instruction set, as plain shared libraries for ctypes.

All of them are optional: where there is no compiler, or one that lacks a flag, the package installs without and the
reference kernels do the work (docs/cpu-kernels.md). Everything else is in pyproject.toml.
"""

import os
import platform

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = "thalweg/kernels/cpu/native"
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall"]
# Each level needs the ones before it; library.py chooses by what the processor has.
LEVELS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}


def _files(ending: str) -> list[str]:
    """Paths relative to this file, as setuptools wants them."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), NATIVE)
    return sorted(f"{NATIVE}/{name}" for name in os.listdir(folder) if name.endswith(ending))


def _extensions() -> list[Extension]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [
        Extension(
            f"thalweg.kernels.cpu.lib{level}",
            sources=_files(".cpp"),
            depends=_files(".h"),
            extra_compile_args=FLAGS + flags,
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
        for level, flags in LEVELS.items()
        if x86 or not flags
    ]


class PlainLibrary(build_ext):
    """A shared library under its plain name: it knows nothing of Python, so no version of it belongs into the name."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class AnyPython(bdist_wheel):
    """One wheel of a platform for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=_extensions(), cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython})
