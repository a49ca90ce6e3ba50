"""math-verify in a child process, with a time and a memory limit.

math-verify bounds its own time with SIGALRM, which fails outside the main thread and replaces the host
program's handler; sympy can also exhaust memory before any alarm. A child process has neither problem.
This file is both sides: imported, the parent's; run as a program, the child's (JSON lines in and out).
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, cast

Verdict = Literal["equal", "different", "unreadable", "timeout"]
START_SECONDS = 60.0
MEMORY_BYTES = 4 << 30


class MathProcess:
    """Compares answers in a child process that is started when first needed and ends with its owner.

    Safe to share between threads; after a fork the copy starts a child of its own.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def compare(self, gold: str, answer: str) -> Verdict:
        """Whether answer equals gold; "unreadable" is about gold, "timeout" also covers a child that died."""
        with self._lock:
            child = self._started()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                child.stdin.flush()
                reply = _read_line(child, self.timeout_seconds)
            except BrokenPipeError:
                reply = None
            if reply is None:
                self._end()
                return "timeout"
            return cast(Verdict, reply)

    def close(self) -> None:
        """Ends the child process, if there is one."""
        with self._lock:
            self._end()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # else modules are gone, and the child ends when its input does
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self._end()
        # -P: this file's neighbours must not shadow the modules that sympy imports.
        command = [sys.executable, "-P", os.path.abspath(__file__), str(math.ceil(self.timeout_seconds) + 1)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._child, self._owner = child, os.getpid()
        if _read_line(child, START_SECONDS) != "ready":
            self._end()
            raise RuntimeError(f"expected {command} to start math-verify, got no answer from it")
        return child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _read_line(child: subprocess.Popen[bytes], seconds: float) -> str | None:
    """One JSON line of the child's output; None if it ends or says nothing in time."""
    assert child.stdout is not None
    data, deadline = b"", time.monotonic() + seconds
    waiter = select.poll()  # unlike select, works with any number of open files
    waiter.register(child.stdout, select.POLLIN)
    while not data.endswith(b"\n"):
        ready = waiter.poll(1000 * max(0.0, deadline - time.monotonic()))
        chunk = os.read(child.stdout.fileno(), 4096) if ready else b""
        if not chunk:
            return None
        data += chunk
    return json.loads(data)


def _compare(math_verify: Any, gold: str, answer: str) -> Verdict:
    marked = gold if "\\boxed" in gold or "$" in gold else f"\\boxed{{{gold}}}"
    # No timeouts in here: the parent keeps the time.
    known = math_verify.parse(marked, parsing_timeout=None)
    if not known:
        return "unreadable"
    given = math_verify.parse(answer, parsing_timeout=None)
    return "equal" if math_verify.verify(known, given, timeout_seconds=None) else "different"


def _serve(alarm_seconds: int) -> None:
    import logging
    import resource
    import signal

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    import math_verify

    def reply(word: str) -> None:
        replies.write(json.dumps(word) + "\n")
        replies.flush()

    reply("ready")
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.alarm(alarm_seconds)  # ends this process even if its owner was killed while it computes
        try:
            reply(_compare(math_verify, gold, answer))
        except Exception:  # RecursionError, MemoryError and the like, caused by the answer
            reply("different")
        signal.alarm(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
