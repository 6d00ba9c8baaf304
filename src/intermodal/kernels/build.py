"""C++ of this package, compiled for the processor it runs on when it is first wanted, as `torch.compile` does it.

A library is plain C to the outside, knows nothing of PyTorch, and shares its threads (the OpenMP that PyTorch brings).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (its OpenMP must be there before a library asks for one)
from rich.console import Console

from ..files import cache_folder

FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-fopenmp")


def compiler() -> str | None:
    """The C++ compiler's path: `CXX`, or `c++`."""
    return shutil.which(os.environ.get("CXX", "c++"))


@cache
def library(name: str, *more: str) -> ctypes.CDLL | None:
    """`name`.cpp of this folder, from the user's cache folder; compiled at the first call on a machine, in some seconds.

    Args:
        more: flags after `FLAGS`.

    Returns:
        None where it cannot be had: on another system than Linux or without a compiler (install g++), silently; with a warning where the
        compiler (g++ 12 or newer, or clang) refuses it. What asks for a library has a slower way of its own.
    """
    command = compiler()
    if not sys.platform.startswith("linux") or command is None:
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        version = subprocess.run([command, "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(b"\0".join([source.read_bytes(), version, _processor(), *(flag.encode() for flag in (*FLAGS, *more))]))
        file = cache_folder() / "kernels" / f"{name}-{key.hexdigest()[:16]}.so"
        if not file.exists():
            _compile([command, *FLAGS, *more, str(source)], file)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        why = next((line for line in said if "error" in line), said[-1] if said else f"it ended with {error.returncode}")
    except OSError as error:  # no room, a folder that cannot be written, a library that does not load
        why = str(error)
    warnings.warn(f"{source.name} could not be compiled by {command}, and PyTorch does its work, slower: {why}", stacklevel=2)
    return None


def _processor() -> bytes:
    """What of the processor decides over the code: a home folder may serve several machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})).encode()


def _compile(command: list[str], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=file.parent) as folder,  # whole or not at all: others may compile it meanwhile
        Console(stderr=True).status(f"compiling {Path(command[-1]).name} for this processor, once"),
    ):
        part = Path(folder) / file.name
        subprocess.run([*command, "-o", str(part)], capture_output=True, check=True)
        part.replace(file)
