"""Compiles the C files of this folder in the background, with the system's compiler, once on each machine.

    native.start("decode.c")        # begins to compile, unless that was done before; takes about a second
    native.library("decode.c")      # the ctypes library; None while it is not ready, or cannot be made
    native.wait("decode.c")         # the same, but waits for the compiler

The result is in __pycache__, under a name that changes with the source and the processor. Nothing here
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
    """Compile `source`, a file in this folder, unless that was done; returns the library's path, or None."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    source = os.path.join(HERE, source)
    folder = os.path.join(HERE, "__pycache__")
    try:
        with open(source, "rb") as f:
            content = f.read() + repr((compiler, FLAGS, processor())).encode()
        key = hashlib.sha256(content).hexdigest()[:16]
        stem = os.path.splitext(os.path.basename(source))[0]
        path = os.path.join(folder, f"{stem}-{key}.so")
        if os.path.exists(path):
            return path
        os.makedirs(folder, exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"
        command = shlex.join([*shlex.split(compiler), *FLAGS, source, "-o", temporary, "-lm"])
        # In its own session, so that a script that ends sooner does not wait for it. The second command is
        # for compilers without OpenMP.
        COMPILING[path] = subprocess.Popen(
            ["sh", "-c", f"{{ {command} -fopenmp || {command}; }} && mv {shlex.join([temporary, path])}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
    except OSError:  # no shell, or a folder that cannot be written to
        return None
    return path


@functools.cache
def load(path):
    """The library at `path`; None where it cannot be loaded."""
    try:
        return ctypes.CDLL(path)
    except OSError:
        return None


def library(source):
    """The compiled library of `source`, or None."""
    path = start(source)
    return load(path) if path and os.path.exists(path) else None


def wait(source, seconds=60):
    """The library of `source` after the compiler has ended; None if that failed, or took longer."""
    process = COMPILING.get(start(source))
    if process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    return library(source)
