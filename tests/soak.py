"""Kill, fill and flip for minutes; the suite runs a short form of each (test_reliability.py).

    python tests/soak.py                    about ten minutes
    python tests/soak.py --kills 20 --flips 500

A run that saves constantly is killed at random moments and continued from the newest valid checkpoint; at the
end it must equal a run that nobody touched, bit for bit. A disk is filled so that saves fail at many places.
Bits of a checkpoint are flipped, and it is cut at every kilobyte. Prints a table and, last, one JSON object;
exit status 1 if anything was lost.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--kills", type=int, default=200)
    cli.add_argument("--zero_kills", type=int, default=20, help="of a DeepSpeed training")
    cli.add_argument("--fills", type=int, default=100)
    cli.add_argument("--flips", type=int, default=20000)
    cli.add_argument("--seed", type=int, default=0)
    ARGS = cli.parse_args()

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import Workspace, exact, forks, wait_for

import checkpoint as ckpt
from script import InputError
from verify_resume import differences

CONSTANT_SAVES = ["--eval_interval", 1, "--save_interval", 1, "--eval_iters", 1, "--lr_decay_iters", 100000,
                  "--gradient_accumulation_steps", 1, "--dropout", 0.1]

def check_files(folder):
    """Load every checkpoint of a folder (an InputError means that one was lost); the newest one's step."""
    return max((ckpt.load(path)["step"] for path in folder.glob("*.pt")), default=0)


def kill_and_continue(workspace, kills, rng, progress=lambda n: None):
    """Kill a run -9 at `kills` random moments, continue it each time, and compare it with an untouched one.

    Returns counts: kills, those in the middle of a save, steps reached, checkpoints read. Raises
    AssertionError or InputError if anything was lost."""
    folder = workspace.path / "checkpoint"
    def start(*words):
        (workspace.path / "stderr.txt").unlink(missing_ok=True)
        return forks().start(workspace.path, ["train.py", *words], stderr="stderr.txt")

    found = {"kills": 0, "in_a_save": 0, "steps": 0, "checkpoints_read": 0}
    for n in range(kills):
        where = ["--from_checkpoint", "latest"] if found["steps"] else []
        known = set(folder.glob("pretrain_2*.pt"))
        run = start(*CONSTANT_SAVES, "--max_steps", 0, *where)
        deadline = time.monotonic() + 60
        while not set(folder.glob("pretrain_2*.pt")) - known and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        status = run.wait()
        assert status == -signal.SIGKILL, (status, (workspace.path / "stderr.txt").read_text())
        step = check_files(folder)
        assert step >= found["steps"], f"went back from step {found['steps']} to {step}"
        half = list(folder.glob("*.tmp"))
        found["kills"], found["steps"] = n + 1, step
        found["in_a_save"] += bool(half)
        dated = sorted(folder.glob("pretrain_2*.pt"), key=os.path.getmtime)
        found["checkpoints_read"] += len(dated)
        for path in [*half, *dated[:-3]]:  # room for the next round; what "latest" means stays
            path.unlink()
        progress(n + 1)
    last = ["--max_steps", found["steps"] + 3]
    continued = start(*CONSTANT_SAVES, *last, "--from_checkpoint", "latest")
    assert continued.wait() == 0, (workspace.path / "stderr.txt").read_text()
    continued = workspace.load("pretrain_last.pt")
    for path in folder.iterdir():
        path.unlink()
    assert start(*CONSTANT_SAVES, *last, "--save_interval", 10**9).wait() == 0
    untouched = workspace.load("pretrain_last.pt")
    different = differences(exact(continued), exact(untouched), "checkpoint")
    assert not different, different[:5]
    return found


def stop_in_a_save(ranks, folder, rng):
    """Halt the ranks (SIGSTOP) at a random moment at which a half-written save lies in `folder`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        wait_for(lambda: list(folder.glob("*_step_*.tmp")), ranks[0])
        time.sleep(rng.uniform(0, 0.005))
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        if list(folder.glob("*_step_*.tmp")):
            return
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
    raise AssertionError("no save was caught in a minute")


def kill_deepspeed_and_continue(workspace, kills, rng, progress=lambda n: None):
    """Kill both processes of a ZeRO training -9 in the middle of a save, `kills` times, continuing it each
    time; then let it end. Returns counts. Raises AssertionError or InputError if anything was lost."""
    folder = workspace.path / "checkpoint" / "ds"
    words = ["train_deepspeed.py", *CONSTANT_SAVES, "--gradient_accumulation_steps", 2]
    found = {"kills": 0, "in_a_save": 0, "steps": 0}

    def start(max_steps):
        where = ["--from_checkpoint", "latest"] if found["steps"] else []
        (workspace.path / "output.txt").unlink(missing_ok=True)
        return workspace.start_ranks(2, *words, "--max_steps", max_steps, *where, server=forks("deepspeed"))

    for n in range(kills):
        known = set(folder.glob("*_step_*[0-9]"))
        ranks = start(0)
        wait_for(lambda: len(set(folder.glob("*_step_*[0-9]")) - known) > 1, ranks[0])  # noqa: B023
        stop_in_a_save(ranks, folder, rng)
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
        assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
        found["kills"] = n + 1
        found["in_a_save"] += bool(list(folder.glob("*_step_*.tmp")))
        step = ckpt.load(folder)["step"]
        assert step > found["steps"], f"went back from step {found['steps']} to {step}"
        for path in folder.glob("*_step_*[0-9]"):  # each can be put together
            assert path.is_symlink() or ckpt.load(path)["step"] <= step + 1
        found["steps"] = step
        progress(n + 1)
    ranks = start(found["steps"] + 2)
    assert [rank.wait() for rank in ranks] == [0, 0], workspace.output()
    assert f"(step {found['steps']})" in workspace.output()
    assert ckpt.load(folder)["step"] == found["steps"] + 2 and not list(folder.glob("*.tmp"))
    return found


@contextmanager
def small_disk(folder, megabytes=20):
    """A disk of 20 MB at `folder`: a tmpfs where this user may mount one (yields True), else False."""
    mounted = os.name == "posix" and shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
        capture_output=True).returncode == 0
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def leave_free(folder, n_bytes):
    """Fill the disk of `folder`, but for about `n_bytes`."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    disk = os.statvfs(folder)
    with open(filler, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - n_bytes))


@contextmanager
def largest_file(n_bytes):
    """No file may grow beyond `n_bytes`: a full disk, where no disk may be mounted."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_without_room(folder, checkpoint, rooms):
    """Save with too little room, again and again: each time one line, the old file whole, nothing left over.

    rooms: bytes that are free. Returns the messages and "tmpfs" or "limit"."""
    messages = []
    with small_disk(folder) as mounted:
        path = folder / "old.pt"
        ckpt.save(str(path), checkpoint)
        old = path.read_bytes()
        for room in rooms:
            if mounted:
                leave_free(folder, room)
            try:
                with largest_file(room) if not mounted else largest_file(2**40):
                    ckpt.save(str(path), checkpoint)
                raise AssertionError(f"saved {len(old)} bytes where {room} were free")
            except InputError as error:
                messages.append(str(error))
            assert path.read_bytes() == old and not list(folder.glob("*.tmp"))
            ckpt.load(path)
    return messages, "tmpfs" if mounted else "limit"


def flip_bits(path, scratch, flips, rng):
    """Flip one bit at `flips` random places. Returns how often the file was refused, and read as before."""
    content, expected = path.read_bytes(), ckpt.load(path)
    refused = unchanged = 0
    for _ in range(flips):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        scratch.write_bytes(damaged)
        try:
            got = ckpt.load(scratch)
        except InputError as error:
            assert str(error).startswith(f"{scratch}: ") and "\n" not in str(error), error
            refused += 1
        else:
            assert not differences(got, expected, "checkpoint")
            unchanged += 1
    return refused, unchanged


def cut(path, scratch, step=1024):
    """Cut a file at every `step` bytes: each piece must be refused. Returns their number."""
    content = path.read_bytes()
    for length in range(0, len(content), step):
        scratch.write_bytes(content[:length])
        try:
            ckpt.load(scratch)
        except InputError:
            continue
        raise AssertionError(f"{length} of {len(content)} bytes were taken for a checkpoint")
    return len(range(0, len(content), step))


def main():
    rng = random.Random(ARGS.seed)
    began = time.monotonic()
    table, result = [], {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as zero_folder:
        workspace = Workspace(folder)
        found = kill_and_continue(workspace, ARGS.kills, rng,
                                  lambda n: print(f"\rkills: {n}", end="", file=sys.stderr, flush=True))
        print(file=sys.stderr)
        result.update(found)
        table.append(("kill -9 at a random moment", f"{found['kills']} ({found['in_a_save']} in a save)",
                      f"nothing; equal to an untouched run of {found['steps'] + 3} steps, bit for bit"))
        zero = kill_deepspeed_and_continue(
            Workspace(zero_folder), ARGS.zero_kills, rng,
            lambda n: print(f"\rkills under DeepSpeed: {n}", end="", file=sys.stderr, flush=True))
        print(file=sys.stderr)
        result["deepspeed"] = zero
        table.append(("kill -9 in the middle of a ZeRO save",
                      f"{zero['kills']} ({zero['in_a_save']} in a save)",
                      "nothing; the run continued from the last whole one"))
        whole, scratch = workspace.path / "checkpoint" / "pretrain_last.pt", Path(folder) / "scratch.pt"
        small = Path(folder) / "small"
        small.mkdir()
        size = whole.stat().st_size
        rooms = [rng.randrange(4096, size * 9 // 10) for _ in range(ARGS.fills)]
        messages, kind = save_without_room(small, ckpt.load(whole), rooms)
        result.update(full_disk=len(messages), full_disk_kind=kind)
        table.append((f"disk full in a save ({kind})", len(messages), "that save; the old file is whole"))
        refused, unchanged = flip_bits(whole, scratch, ARGS.flips, rng)
        result.update(bits_flipped=ARGS.flips, refused=refused, read_as_before=unchanged)
        table.append(("one bit flipped", ARGS.flips, f"{refused} refused, {unchanged} read as before"))
        result["cuts"] = cut(whole, scratch)
        table.append(("cut at every kilobyte", result["cuts"], "all refused"))
    result["seconds"] = round(time.monotonic() - began)
    for what, times, lost in table:
        print(f"{what:45} {times!s:22} {lost}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
