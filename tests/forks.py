"""Processes of scripts that start in a tenth of a second: they are forked from one that has imported torch.

    fork = Forks().start(folder, ["train.py", "--max_steps", "3"], stdout="out.txt", stderr="err.txt")
    fork.send_signal(signal.SIGTERM)
    status = fork.wait()

A fork runs the script that its folder holds, as `python SCRIPT` would: none of the project's modules are
imported beforehand, and it ends as Python does. What Python reads from the environment when it starts
(PYTHONPATH, PYTHONIOENCODING) and closed standard streams need a new process instead.
"""

import json
import os
import subprocess
import sys
import time

SERVER = """
import json, os, runpy, sys

commands, answers = map(int, sys.argv[1:3])
os.environ.setdefault("DS_ACCELERATOR", "cpu")
for name in sys.argv[3:]:
    __import__(name)
lines = os.fdopen(commands, "r")
while True:
    line = lines.readline()
    if not line:
        sys.exit()
    order = json.loads(line)
    if "wait" in order:
        answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
    else:
        answer = os.fork()
    if answer == 0 and "wait" not in order:
        break
    os.write(answers, f"{answer}\\n".encode())

os.close(commands)
os.close(answers)
os.chdir(order["folder"])
os.environ.update(order["env"])
for number, (path, flags) in enumerate((("stdin", os.O_RDONLY),
                                        ("stdout", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                                        ("stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND))):
    if order[path] != "same":
        os.dup2(os.open(order[path], flags), number)
words = order["words"]
sys.path[0] = order["folder"]
if words[0] == "-m":
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
"""


def running(pid):
    """Is there a process of that number that has not ended?"""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Fork:
    """A process that `Forks` started."""

    def __init__(self, server, pid):
        self.server = server
        self.pid = pid
        self.status = None

    def running(self):
        return self.status is None and running(self.pid)

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def wait(self, timeout=120):
        """Its exit status, or minus the signal that ended it. A process that does not end is killed."""
        deadline = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > deadline:
                os.kill(self.pid, 9)
                self.server.ask(wait=self.pid)
                raise AssertionError(f"still running after {timeout} s")
            time.sleep(0.005)
        if self.status is None:
            self.status = self.server.ask(wait=self.pid)
        return self.status


class Forks:
    """The process that imports `modules` and forks the others."""

    def __init__(self, *modules):
        commands, self.commands = os.pipe()
        answers, their_answers = os.pipe()
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        env.pop("PYTHONUNBUFFERED", None)  # most users have not set it
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(commands), str(their_answers), *modules], env=env,
            pass_fds=(commands, their_answers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(commands)
        os.close(their_answers)
        self.answers = os.fdopen(answers, "r")

    def ask(self, **order):
        os.write(self.commands, (json.dumps(order) + "\n").encode())
        return int(self.answers.readline())

    def start(self, folder, words, stdin=os.devnull, stdout=os.devnull, stderr=os.devnull, env=None):
        """Run the script words[0], or the module after "-m", in `folder`; returns a Fork.

        stdin, stdout, stderr: paths, which may be those of pipes."""
        env = {name: str(value) for name, value in (env or {}).items()}
        return Fork(self, self.ask(folder=str(folder), words=list(map(str, words)), stdin=str(stdin),
                                   stdout=str(stdout), stderr=str(stderr), env=env))

    def close(self):
        os.close(self.commands)
        self.answers.close()
        self.process.wait()
