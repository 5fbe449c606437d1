"""Tasks for executors, which import nothing that is slow."""

import os
import signal
import time
from pathlib import Path


def leave(path, text):
    Path(path).write_text(text)


def fail(message):
    raise ValueError(message)


def fail_oddly():
    class Odd(Exception):
        pass

    raise Odd("no other process knows this class")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stay(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)
