"""C++ of this package, compiled for the processor it runs on when it is first wanted, as `torch.compile` does it.

A library is plain C to the outside and knows nothing of PyTorch; compiled by g++ it finds the OpenMP that PyTorch brings, and its threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (its OpenMP must be there before a library asks for one)
from rich.console import Console

from ..files import cache_folder

FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-fopenmp")
SECONDS = 120
"""After which a compiler is given up; it takes three."""
_ONE = threading.RLock()


def compiler() -> list[str] | None:
    """The command of the C++ compiler: `CXX`, or the first there is of c++, g++ and clang++."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def library(name: str, *more: str) -> ctypes.CDLL | None:
    """`name`.cpp of this folder, from the user's cache folder; compiled at the first call on a machine, in some seconds.

    Args:
        more: flags after `FLAGS`.

    Returns:
        None where it cannot be had: on another system than Linux, or where it was not compiled yet and there is no compiler (install
        g++), silently; with a warning where the compiler (g++ 12 or newer, or clang) refuses it, is not what `CXX` names, or the cache
        folder cannot be used. What asks for a library has a slower way of its own.
    """
    with _ONE:  # threads that ask at once
        return _library(name, *more)


@cache
def _library(name: str, *more: str) -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        parts = [source.read_bytes(), _processor(), *(flag.encode() for flag in (*FLAGS, *more))]
        folder, key = cache_folder() / "kernels", f"{name}-{hashlib.sha256(b' '.join(parts)).hexdigest()[:16]}"
        found = _loaded(folder, key)
        if found is None and (command := compiler()) is not None:
            _compile([*command, *FLAGS, *more, str(source)], folder, key)
            found = _loaded(folder, key)
            if found is None:
                raise OSError(f"what {command[0]} made cannot be loaded")
        if found is not None or not os.environ.get("CXX"):
            return found
        why = f"there is no {os.environ['CXX']}, which CXX names"
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        why = next((line for line in said if "error" in line), said[-1] if said else f"it ended with {error.returncode}")
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # no room or right to write, no home, a compiler that hangs
        why = str(error)
    warnings.warn(f"{source.name} could not be compiled, and its work is done without it, slower: {why}", stacklevel=4)
    return None


def _processor() -> bytes:
    """What of the processor decides over the code: a home folder may serve several machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})).encode()


def _loaded(folder: Path, key: str) -> ctypes.CDLL | None:
    """A compiled library; a damaged one is taken away. Its name says its length: a file that was cut short would kill the process."""
    for file in folder.glob(f"{key}-*.so"):
        if file.stat().st_size == int(file.stem.rsplit("-", 1)[1]):
            try:
                return ctypes.CDLL(str(file))
            except OSError as error:
                warnings.warn(f"{file} is compiled anew, for it cannot be loaded: {error}", stacklevel=5)
        file.unlink(missing_ok=True)
    return None


def _compile(command: list[str], folder: Path, key: str) -> None:
    """Compile a file that is there whole or not at all. Processes that want the same one wait for the first."""
    import fcntl  # which Windows has not

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if any(folder.glob(f"{key}-*.so")):
            return
        part = folder / f"{key}.part"
        with Console(stderr=True).status(f"compiling {Path(command[-1]).name} for this processor, once"):
            subprocess.run([*command, "-o", str(part)], stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=SECONDS)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.replace(folder / f"{key}-{part.stat().st_size}.so")
