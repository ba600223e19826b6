"""What a comparison asks of an arm's process: a line of JSON for each command and each answer."""

import json
import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accel.errors import AccelError

COMMANDS = ("start", "price", "generate", "look")


def serve(arm: Any, lines: Iterable[str], say: Callable[[str], Any]) -> None:
    """Obey every line and `say` the answer; an error is one too, and the arm goes on."""
    for line in lines:
        command = json.loads(line)
        name = command.pop("do")
        try:
            if name not in COMMANDS:
                raise AccelError(f"an arm does {', '.join(COMMANDS)}, not {name!r}")
            do: Callable[..., dict[str, Any]] = getattr(arm, name)
            answer: dict[str, Any] = {"ok": do(**command)}
        except Exception as error:  # whatever a model raises is reported, and ends this arm alone
            traceback.print_exc()
            known = isinstance(error, AccelError)
            answer = {"error": str(error) if known else f"{type(error).__name__}: {error}"}
        say(json.dumps(answer))


def until_closed(stream: Iterable[str]) -> Iterator[str]:
    """The lines of `stream`; where it ends, so does this process, whatever it is doing."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()
