"""The compiled CPU kernels (*.cpp): built once per machine, kept in the user's cache.

They need a C++ compiler and AVX-512. Without either, the torch kernels compute the same, slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch.utils import cpp_extension

from pipeline.model.machine import cpu_description, private_cache
from pipeline.private_folder import NotPrivate, check_private

_SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("native.cpp", "views.cpp", "strict.cpp", "linear.cpp", "bfloat16.cpp", "pool.cpp")
)
_HEADERS = tuple(
    Path(__file__).with_name(name)
    for name in ("exp2.h", "floats.h", "gemm.h", "halves.h", "pool.h", "rules.h")
)
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp")
_MACROS = ("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512")
_BUILD_LIMIT_S = 300
_LOCK = threading.Lock()


def why_unavailable() -> str | None:
    """None once the kernels are loaded (`torch.ops.coppice`), else a clause that says why not.

    The first call on a machine compiles them, half a minute. Other threads wait for it: each would
    build and load a library of its own, and torch aborts where operators are registered twice.
    """
    with _LOCK:
        return _why_unavailable()


@functools.cache
def _why_unavailable() -> str | None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "this CPU has no AVX-512"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this build of torch has no oneDNN"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    try:
        library = _library(compiler)
        if not _load(library):
            if compiler is None:
                return "there is no C++ compiler"
            _build(compiler, library)
            _load(library)
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).strip().splitlines() or ["no message"]
        return f"they do not compile: {lines[0]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"they cannot be built or loaded: {str(error).splitlines()[0]}"
    return None


@functools.cache
def ways_of_bfloat16() -> tuple[str, ...]:
    """Bfloat16 is multiplied as bfloat16, half or widened here, fastest first (`bfloat16.cpp`)."""
    return tuple(torch.ops.coppice.ways_of_bfloat16())


def way_of_bfloat16() -> str:
    """The fastest."""
    return ways_of_bfloat16()[0]


def _library(compiler: str | None) -> Path:
    """Named by all that the machine code depends on."""
    sources = [path.read_text(encoding="utf-8") for path in (*_SOURCES, *_HEADERS)]
    parts = (*sources, *_FLAGS, *_MACROS, torch.__version__, str(compiler), cpu_description())
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return private_cache("kernels") / f"native-{digest}.so"


def _load(library: Path) -> bool:
    """Load the very file that was found to be ours; False where there is none that is."""
    try:
        file = _open_ours(library)
    except (FileNotFoundError, NotPrivate):
        return False
    try:
        ctypes.CDLL(f"/dev/fd/{file}")  # by its path it could be another one by now
    finally:
        os.close(file)
    return True


def _open_ours(library: Path) -> int:
    """A descriptor of the library. Raises NotPrivate if others could have written it, OSError."""
    file = os.open(library, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        check_private(os.fstat(file), library)
    except BaseException:
        os.close(file)
        raise
    return file


def _build(compiler: str, library: Path) -> None:
    """Compile beside the final place, then rename: another process sees all of it or nothing."""
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built, sources = Path(folder) / library.name, map(str, _SOURCES)
        command = [compiler, *_FLAGS, *_MACROS, *include, *sources, *link, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_LIMIT_S)
        built.chmod(0o700)  # whatever the umask says
        os.replace(built, library)


if __name__ == "__main__":
    sys.exit(why_unavailable())
