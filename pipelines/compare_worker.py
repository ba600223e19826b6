"""The process of one arm, seen from the comparison: commands out, answers back, or it failed."""

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from accel.errors import AccelError
from accel.files import write_atomically

CLOSING_S = 10


class ArmFailed(AccelError):
    """An arm that answered with an error, took too long, or died; the message says which."""


class Worker:
    """A running arm. folder: gets its specification and its log.

    command: how the process is started; the path of the specification is added.
    """

    def __init__(
        self,
        folder: Path,
        spec: dict[str, Any],
        command: tuple[str, ...] = (sys.executable, "-m", "accel.pipelines.compare_arm"),
    ) -> None:
        path = write_atomically(folder / "spec.json", json.dumps(spec, indent=1))
        self._log_path = folder / "log.txt"
        self._log = self._log_path.open("w")
        self._process = subprocess.Popen(
            [*command, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, command: dict[str, Any], timeout_s: int | float) -> dict[str, Any]:
        """The answer to one command; raises ArmFailed, after which the process is gone."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.close(at_once=True)
            raise ArmFailed(
                f"no answer to {command['do']!r} within {timeout_s:g} s (arms_timeout_s)"
            ) from None
        except BrokenPipeError:
            line = None
        if line is None:
            raise ArmFailed(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            raise ArmFailed(answer["error"])
        return answer["ok"]

    @property
    def returncode(self) -> int | None:
        """How the process ended; None while it runs, negative where a signal ended it."""
        return self._process.returncode

    def _last_words(self) -> str:
        self.close()
        code = self.returncode
        why = " (killed; was there enough memory?)" if code == -9 else ""
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        return f"the process of this arm ended with code {code}{why}{said}; see {self._log_path}"

    def close(self, at_once: bool = False) -> None:
        """End the process: by closing its stdin, or at once."""
        process = self._process
        if at_once:
            process.kill()
        try:
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join(CLOSING_S)
        if process.stdout is not None and not self._reader.is_alive():
            process.stdout.close()
        self._log.close()
