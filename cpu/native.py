"""C files of this project, compiled in the background by the system's compiler, once on a machine.

    native.start("decode.c")        # begins to compile, unless it was done before; takes about a second
    native.library("decode.c")      # the ctypes library; None while it is not ready, or cannot be made
    native.wait("decode.c")         # the same, but waits for it: for what measures or tests it

The result lies in __pycache__, under a name that changes with the source and the processor. Nothing here
imports torch, so that a script can compile while that is being imported.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess

HERE = os.path.dirname(os.path.abspath(__file__))
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
COMPILING = {}  # path of a library -> the process that makes it


def processor():
    """What -march=native depends on."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line for line in f if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.platform() + platform.processor()


@functools.cache
def start(source):
    """Compile `source`, a file beside this one, unless that was done; returns the library's path, or None."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    source, folder = os.path.join(HERE, source), os.path.join(HERE, "__pycache__")
    try:
        with open(source, "rb") as f:
            key = hashlib.sha256(f.read() + repr((compiler, FLAGS, processor())).encode()).hexdigest()[:16]
        stem = os.path.splitext(os.path.basename(source))[0]
        path = os.path.join(folder, f"{stem}-{key}.so")
        if os.path.exists(path):
            return path
        os.makedirs(folder, exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"
        command = shlex.join([*shlex.split(compiler), *FLAGS, source, "-o", temporary, "-lm"])
        # On its own, so that a program that ends sooner need not wait for it; without OpenMP if need be.
        COMPILING[path] = subprocess.Popen(
            ["sh", "-c", f"{{ {command} -fopenmp || {command}; }} && mv {shlex.join([temporary, path])}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
    except OSError:  # no shell, or a folder that cannot be written to
        return None
    return path


@functools.cache
def load(path):
    try:
        return ctypes.CDLL(path)
    except OSError:
        return None


def library(source):
    """The compiled library as ctypes has it, or None."""
    path = start(source)
    return load(path) if path and os.path.exists(path) else None


def wait(source, seconds=60):
    """The library, after it has been compiled or cannot be."""
    process = COMPILING.get(start(source))
    if process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    return library(source)
