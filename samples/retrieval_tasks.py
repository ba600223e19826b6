"""Questions about long texts whose right answers are known: a few keys in much text, many keys at
once, and marked passages of words to copy. A task is a pure function of its seed, index and source.

    text ... bake 4821 ... text              lines strewn through the source text
    find                                     the question, at the end
    bake ? ?
    bake 4821                                the answer

Lines of question and answer have one number of tokens, so that what stands after a key in either is
found by what stands as far behind it.
"""

import hashlib
import sysconfig
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

__all__ = [
    "KEYS",
    "KINDS",
    "LINE_TOKENS",
    "Shape",
    "Source",
    "Task",
    "make_task",
    "new_keys",
    "stdlib_texts",
]

KINDS = ("needle", "copy", "recall")
FIRST = tuple(c + v for c in "bdfghklmnprstvwz" for v in "aeiou")
SECOND = tuple(c + v for c in "bfghkmpvwz" for v in "aeiou")
# so few that a small vocabulary has each as a token, far from each other among all pairs
KEYS = tuple(FIRST[7 * n // len(SECOND)] + SECOND[7 * n % len(SECOND)] for n in range(512))
WORD_TOKENS = 2  # of a line of a passage, "bake\n"
LINE_TOKENS = 4  # of "bake 4821\n" and of "bake ? ?\n" in the sample's tokenizer
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data", "encodings"}
Count = Callable[[Sequence[str]], list[int]]


def stdlib_texts(held_out: bool) -> list[str]:
    """The running interpreter's standard library without its tests, in the order of its file
    names; of every twenty files about one, by a hash of its name, is held out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts) or name.parts[0].startswith("config-"):
            continue
        if (hashlib.sha256(name.as_posix().encode()).digest()[0] % 20 == 7) != held_out:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        lines = [line.rstrip() for line in text.splitlines()]
        lines = [line for line in lines if line.isascii() and len(line) <= 200]
        if len(lines) >= 5:
            texts.append("\n".join(lines) + "\n")
    return texts


class Source:
    """Lines of text and how many tokens each has with its line break."""

    def __init__(self, texts: Sequence[str], count: Count) -> None:
        """count: numbers of tokens of several texts; of two after one another it has to be the
        sum, where the first ends with a line break.
        """
        self.count = count
        self.lines = [line for text in texts for line in text.splitlines()]
        lengths = count([f"{line}\n" for line in self.lines])
        self._ends = [0, *np.cumsum(lengths).tolist()]

    def window(self, start: int, tokens: int) -> list[str]:
        """As many lines from `start` on as have at most `tokens` tokens."""
        stop = bisect_right(self._ends, self._ends[start] + tokens) - 1
        return self.lines[start:stop]

    def draw(self, rng: np.random.Generator, tokens: int) -> list[str]:
        """A window at a random place, not at the very end."""
        last = bisect_right(self._ends, self._ends[-1] - tokens) - 1
        if last < 1:
            raise ValueError(f"{tokens} tokens were asked of a source of {self._ends[-1]}")
        return self.window(int(rng.integers(last)), tokens)


@dataclass(frozen=True)
class Shape:
    """How much there is in a task: `prompt` tokens with `extra` of the chat template among them,
    at most `answer` tokens of answer, and the most of what is asked.

    Where the prompt is short, pairs and passages are as many as find room.
    """

    prompt: int
    answer: int
    extra: int = 3
    needles: int = 8
    needle_queries: int = 3
    pairs: tuple[int, int] = (16, 128)
    queries: int = 40
    passages: int = 3
    passage: int = 200


@dataclass(frozen=True)
class Task:
    """values: lines of the answer that count."""

    task: str
    prompt: str
    answer: str
    values: list[str] = field(default_factory=list)

    def score(self, text: str) -> float:
        """The share of the values that are lines of `text`, each as often as it is asked for."""
        right = Counter(self.values) & Counter(text.splitlines())
        return right.total() / len(self.values)


def new_keys(rng: np.random.Generator, count: int) -> list[str]:
    """Words of two syllables, no two alike."""
    return [KEYS[n] for n in rng.choice(len(KEYS), count, replace=False).tolist()]


def _strewn(rng: np.random.Generator, lines: list[str], blocks: list[list[str]]) -> list[str]:
    """The blocks, in this order, at random places between lines."""
    places = sorted(rng.integers(0, len(lines) + 1, len(blocks)).tolist())
    result, before = [], 0
    for place, block in zip(places, blocks, strict=True):
        result += [*lines[before:place], *block]
        before = place
    return result + lines[before:]


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _laid_out(
    kind: str,
    rng: np.random.Generator,
    source: Source,
    shape: Shape,
    blocks: list[list[str]],
    question: list[str],
    answer: list[str],
    values: list[str],
) -> Task:
    """The blocks in as much text as there is room for."""
    fixed = sum(source.count([_text([line for block in blocks for line in block] + question)]))
    room = shape.prompt - shape.extra - fixed
    lines = _strewn(rng, source.draw(rng, room) if room > 0 else [], blocks)
    return Task(kind, _text(lines + question), _text(answer), values)


def _pairs_task(
    kind: str, rng: np.random.Generator, source: Source, shape: Shape, pairs: int, queries: int
) -> Task:
    keys = new_keys(rng, pairs)
    numbers = rng.integers(0, 10_000, pairs).tolist()
    lines = [f"{key} {number:04d}" for key, number in zip(keys, numbers, strict=True)]
    asked = rng.choice(pairs, queries, replace=False).tolist()
    question = ["find", *(f"{keys[i]} ? ?" for i in asked)]
    values = [lines[i] for i in asked]
    return _laid_out(kind, rng, source, shape, [[x] for x in lines], question, values, values)


def _copy_task(rng: np.random.Generator, source: Source, shape: Shape) -> Task:
    room = shape.prompt - shape.extra - 8
    passages = int(rng.integers(1, shape.passages + 1))
    longest = min(shape.passage, shape.answer - 16, room // passages - 14)
    if longest < 60:
        passages, longest = 1, min(shape.passage, shape.answer - 16, room - 14)
    if longest < 20:
        raise ValueError(f"{shape} has no room for a passage")
    # of all passages no two words are alike, names among them, as far as there are words
    longest = min(longest // WORD_TOKENS, len(KEYS) // passages - 1)
    words = iter(new_keys(rng, passages * (longest + 1)))
    blocks = []
    for _ in range(passages):
        name, count = next(words), int(rng.integers(max(5, longest // 2), longest + 1))
        blocks.append([f"begin:{name}", *islice(words, count), f"end:{name}"])
    asked = int(rng.integers(passages))
    question = ["copy", blocks[asked][0]]
    values = blocks[asked][1:-1]
    return _laid_out("copy", rng, source, shape, blocks, question, blocks[asked], values)


def make_task(kind: str, seed: int, index: int, source: Source, shape: Shape) -> Task:
    """Task `index` of a kind: needle, copy or recall.

    The prompt with the chat template has at most `shape.prompt` tokens, less by no more than a
    line, and the answer with its end at most `shape.answer`.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind), index])
    if kind == "copy":
        return _copy_task(rng, source, shape)
    room = shape.prompt - shape.extra - 4
    line = asked = LINE_TOKENS + 1  # with something to spare
    if kind == "needle":
        most = max(1, min(shape.needles, (room // 2 - asked * shape.needle_queries) // line))
        pairs = int(rng.integers(1, most + 1))
        queries = int(rng.integers(1, min(shape.needle_queries, pairs) + 1))
        return _pairs_task(kind, rng, source, shape, pairs, queries)
    most = min(shape.queries, (shape.answer - 1) // line, room // (line + asked))
    queries = int(rng.integers(max(1, most // 2), most + 1))
    most = min(shape.pairs[1], (room - asked * queries) // line)
    least = min(max(shape.pairs[0], queries), most)
    return _pairs_task(kind, rng, source, shape, int(rng.integers(least, most + 1)), queries)
