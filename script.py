"""What every script needs: errors of one line, output that does not fail, whole files, signals.

This file imports no torch, so that `--help` and mistakes are answered at once.
"""

import contextlib
import functools
import gc
import json
import math
import os
import re
import signal
import sys
import time


class InputError(Exception):
    """Something that the user gave is wrong. Its text is one line: what, where, and what to do."""

    def __str__(self):
        return " ".join(super().__str__().splitlines())  # a name in it may hold line breaks


def prepare_streams():
    """Make standard input, output and error usable: a closed one is replaced by the null device, and
    characters that the output's encoding lacks are written as backslash escapes instead of failing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # its descriptor was closed; the next file opened takes its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def before_imports(parse):
    """What a script does before it imports torch, which takes seconds: call `parse()`, so that --help and
    mistakes in flags and files answer at once.

    From here to `run_script` the garbage collector is off: importing creates half a million objects that
    stay, and scanning them again and again takes a fifth of the time of the imports."""
    prepare_streams()
    # OpenMP reads this when torch loads it: idle threads sleep soon instead of spinning. Next to another busy
    # process, spinning halves the speed of training on a CPU; alone, training does not need it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        parse()
    except InputError as error:
        if int(os.environ.get("RANK") or 0):
            time.sleep(3)  # the first process says the same, and its launcher then ends this one
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    gc.disable()


def run_script(main):
    """Call `main()` as a script does: an `InputError` becomes one line on stderr and exit status 2."""
    prepare_streams()
    if not gc.isenabled():
        gc.freeze()  # what was imported stays, so later collections skip it
        gc.enable()
    try:
        status = main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output (`| head`) has closed it: nothing is left to say
        status = 1
        discard(sys.stdout)
    except (RuntimeError, MemoryError) as error:  # torch's on a GPU and on a CPU, NumPy's
        amount = re.search(r"allocate ([\d.]+ \w+)", str(error))
        if amount is None:
            raise
        status = 2
        print(f"error: out of memory: {amount[1]} more were needed; use a smaller batch or model",
              file=sys.stderr)
    except OSError as error:  # no file of ours is meant, whose errors name it: the output's disk is full
        status = 1
        discard(sys.stdout)
        print(f"error: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
    sys.exit(status)


def discard(stream):
    """Send what a stream has buffered, and all that follows, to the null device: it cannot be written, and
    would fail again when Python exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def replacing(path):
    """Yield the name of a temporary file in the folder of `path`; what is created under it (a file, a link)
    takes the place of `path` in one step at the end.

    If anything fails, the old `path` stays as it was and the temporary file is removed. An OSError becomes an
    InputError that names `path`."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with contextlib.suppress(FileNotFoundError):  # left by a killed process that had the same number
            os.remove(temporary)
        try:
            yield temporary
            os.replace(temporary, path)
            sync_folder(path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(temporary)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file for writing that appears at `path` whole or not at all: see `replacing`.

    mode: "wb" or "w" (UTF-8). Its content is on the disk before it gets its name."""
    encoding = None if "b" in mode else "utf-8"
    with replacing(path) as temporary, open(temporary, mode, encoding=encoding) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path):
    """Make a rename in the folder of `path` survive a power failure."""
    if os.name == "posix":
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def print_json(result):
    """Print a dict as one JSON line, the last of a script's output; non-finite numbers become null."""
    def finite(value):
        if isinstance(value, dict):
            return {str(key): finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value
    print(json.dumps(finite(result), allow_nan=False))


def count(n, noun):
    """A number of things in words, such as "1 head" or "2,000 steps"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@functools.cache
def note(text):
    """Print a line on stderr, once in a process and only in the first process of a run."""
    if not int(os.environ.get("RANK") or 0):
        print(f"note: {text}", file=sys.stderr)


class GuardedStream:
    """A text stream whose writes never raise: what cannot be written (a closed pipe or terminal, a full disk)
    is dropped, so that training goes on and saves."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, call, *args):
        try:
            call(*args)
        except (OSError, ValueError):  # ValueError: the stream was closed
            discard(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def guarded_output():
    """In this context neither standard output nor standard error can make a print or a progress bar fail."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(GuardedStream, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class StopRequest:
    """A signal that asks training to finish its step, save and exit.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal closes; not where it was ignored at the start, as under
    nohup) and SIGUSR1 (schedulers, before the time is up). A second Ctrl-C or SIGTERM ends the process."""

    def __init__(self):
        self.signum = 0  # 0: nobody has asked
        self.since = 0.0

    def __enter__(self):
        self.before = {}  # signal -> its handler until now
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # Windows has the first two
            signum = getattr(signal, name, None)
            if signum is None or (name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):
                continue
            self.before[signum] = signal.signal(signum, self.note)
        return self

    def note(self, signum, frame):
        if self.signum and time.monotonic() - self.since < 1:
            return  # a launcher passes on what the terminal has sent already
        if self.signum and signum in (signal.SIGINT, signal.SIGTERM):
            os._exit(128 + signum)
        self.signum = self.signum or int(signum)
        self.since = time.monotonic()
        print("\nfinishing this step, then saving; once more to exit at once", file=sys.stderr, flush=True)

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
