"""Build the compiled products: six compiler runs, a link, a check in a process of its own, a place in the cache.

The library shares torch's threads. It is compiled for OpenMP but not linked with it, so that it finds the OpenMP that
torch has loaded and never brings a second one into the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

from lorakit.errors import KernelError
from lorakit.folders import put_in_place
from lorakit.ops.native.load import LIBRARY, RECORD, forget, kernel_folder, read_library

_SOURCE = Path(__file__).parent
_MINUTES = 10

# No -ffast-math: NaN and infinity must come through.
_FOR_THIS_PROCESSOR = {"x86_64": ["-march=native"], "aarch64": ["-mcpu=native"]}
_COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
_LOOPS = ["-O3", "-fno-math-errno"]
_TORCH_SIDE = ["-O2", "-fopenmp"]


def build(*, force: bool = False) -> Path:
    """Build the library for this environment, unless a sound one is there already.

    Args:
        force: Build it again all the same.

    Returns:
        The folder that holds it.

    Raises:
        KernelError: There is no compiler, it failed, or what it made does not compute what it should. Nothing was
            changed then.
    """
    folder = kernel_folder()
    if not force and folder.exists():
        try:
            read_library(folder)
            return folder
        except KernelError:
            pass  # it is replaced
    compiler = find_compiler()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".building-{folder.name}-", dir=folder.parent))
    try:
        new = work / "new"
        new.mkdir()
        began = time.monotonic()
        _compile(compiler, work, new / LIBRARY)
        record = {
            "sha256": hashlib.sha256((new / LIBRARY).read_bytes()).hexdigest(),
            "torch": torch.__version__,
            "compiler": shlex.join(compiler),
            "seconds": round(time.monotonic() - began, 1),
        }
        (new / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _check(new)
        try:
            put_in_place(new, folder)
        except OSError:
            read_library(folder)  # another process was quicker; is its library sound?
    finally:
        shutil.rmtree(work, ignore_errors=True)
    forget()
    return folder


def find_compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, else ``g++``.

    Raises:
        KernelError: There is none, or not what it needs.
    """
    if sys.platform != "linux":
        raise KernelError(f"the compiled product is for Linux so far, not {platform.system()}")
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise KernelError(
            f"no C++ compiler was found: {command[0]!r} is not a program here (CXX names another one)"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        raise KernelError(f"{header} is missing: install the headers of this Python (Debian: python3-dev)")
    return command


def _compile(compiler: list[str], work: Path, library: Path) -> None:
    """Compile all files at the same time, and link them."""
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    folders = [
        include,
        include / "torch" / "csrc" / "api" / "include",
        Path(sysconfig.get_paths()["include"]),
    ]
    torch_flags = [
        *_TORCH_SIDE,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(flag for folder in folders for flag in ("-isystem", str(folder))),
    ]
    of_processor = _FOR_THIS_PROCESSOR.get(platform.machine(), [])
    loop_flags = [*_LOOPS, *of_processor]
    compiles = [
        [*compiler, *_COMMON, *flags, "-c", str(_SOURCE / name), "-o", str(work / (name + ".o"))]
        for name, flags in (
            ("low_rank.cpp", torch_flags),
            ("layer.cpp", torch_flags),
            ("lookup.cpp", torch_flags),
            ("nf4.cpp", [*torch_flags, *of_processor]),
            ("products.cpp", loop_flags),
            ("decoder.cpp", [*loop_flags, "-fopenmp"]),
            ("training.cpp", [*loop_flags, "-fopenmp"]),
        )
    ]
    link = [*compiler, "-shared", *(command[-1] for command in compiles), "-o", str(library), f"-L{lib}"]
    link += ["-ltorch_python", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    _run(compiles)
    _run([link])


def _run(commands: list[list[str]]) -> None:
    """Run commands side by side.

    Raises:
        KernelError: One failed; the first line of its output that tells of an error is in the message.
    """
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=60 * _MINUTES)[0] for process in running]
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"the compiler took more than {_MINUTES} minutes") from error
    finally:
        for process in running:
            process.kill()
            process.wait()
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            raise KernelError(f"{command[0]} failed: {_first_error(output, process.returncode)}")


def _check(folder: Path) -> None:
    """Run `lorakit.ops.native.check` on the library.

    Raises:
        KernelError: It failed, or the process died.
    """
    done = subprocess.run(
        [sys.executable, "-m", "lorakit.ops.native.check", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=60 * _MINUTES,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        lines = done.stdout.strip().splitlines()
        reason = lines[-1] if lines else f"the process ended with {done.returncode}"
        raise KernelError(f"the library was compiled but does not work here: {reason}")


def _first_error(output: str, code: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = next((line for line in lines if "error" in line.lower()), None)
    return told or (lines[-1] if lines else f"it ended with {code}")
