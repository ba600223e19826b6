"""What a benchmark is asked for, checked before anything is spent on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.errors import AccelError, nearest
from accel.kernels.arguments import RESTS
from accel.pipelines.bench.case import BenchSettings, Block, Case
from accel.pipelines.bench.kernels import CHOICES
from accel.pipelines.host import DTYPES, resolve_device
from accel.plan import check_block
from accel.untrusted import check_whole, finite

ROWS = ("uniform", "uneven")
ORDERS = ("natural", "per_head")
PRECISIONS = {"cpu": ("full", "half"), "cuda": ("full", "half", "int8", "fp8")}
BLOCKS: dict[str, tuple[Block, ...]] = {"cpu": ((64, 64),), "cuda": ((128, 64),)}
BACKENDS = {
    "cpu": ("native", "cpu", "flex"),
    "cuda": ("triton", "flex", "flashinfer"),
}
SIZES = ("heads", "tokens", "dim")


def bench_settings(config: Mapping[str, Any]) -> BenchSettings:
    """The settings of a configuration; raises AccelError naming the value that cannot be."""
    device = resolve_device("device", config["device"])
    kind = device.type
    if kind not in BACKENDS:
        raise AccelError(f"device is {config['device']!r}; accel-bench measures cpu and cuda")
    kernels = _kernels(config["kernel"])
    for name in ("rounds", "checked_rows", "stride"):
        check_whole(name, config[name], 1)
    for name in ("warm_up_ms", "sample_ms", "limit_s"):
        if not finite(config[name]) or config[name] < 0:
            raise AccelError(f"{name} is {config[name]!r}; it is a number, at least 0")
    if type(config["tune"]) is not bool:
        raise AccelError(f"tune is {config['tune']!r}; it is true or false")
    for name, known in (("order", ORDERS), ("rest", RESTS)):
        if config[name] not in known:
            raise AccelError(
                f"{name} {config[name]!r} is unknown; {nearest(str(config[name]), known)}"
            )
        if config[name] != known[0] and "attention" not in kernels:
            raise AccelError(f"{name} is {config[name]!r}, which only kernel=attention reads")
    keeps = config["keeps"]
    if not isinstance(keeps, Sequence) or not keeps:
        raise AccelError(f"keeps is {keeps!r}; it is a list of fractions, as in keeps=[1.0,0.25]")
    for keep in keeps:
        if not finite(keep) or not 0 < keep <= 1:
            raise AccelError(f"keeps holds {keep!r}; a keep is a fraction in (0, 1]")
    blocks = config["blocks"]
    if blocks is not None and (not isinstance(blocks, Sequence) or not blocks):
        raise AccelError(f"blocks is {blocks!r}; it is a list of pairs, as in blocks=[[128,64]]")
    blocks = BLOCKS[kind] if blocks is None else tuple(check_block(block) for block in blocks)
    if "antidiagonal" in kernels and any(size % config["stride"] for b in blocks for size in b):
        raise AccelError(f"stride is {config['stride']}; it must divide the sizes of {blocks}")
    return BenchSettings(
        device=device,
        kernels=kernels,
        cases=_cases(config, kind),
        backends=_of_device("backends", config, BACKENDS, kind),
        precisions=_of_device("precisions", config, PRECISIONS, kind),
        blocks=blocks,
        keeps=tuple(sorted({float(keep) for keep in keeps}, reverse=True)),
        rows=_chosen("rows", config["rows"], ROWS),
        order=config["order"],
        rest=config["rest"],
        stride=config["stride"],
        rounds=config["rounds"],
        warm_up_ms=float(config["warm_up_ms"]),
        sample_ms=float(config["sample_ms"]),
        limit_s=float(config["limit_s"]),
        checked_rows=config["checked_rows"],
    )


def page_path(value: Any) -> Path | None:
    """Where `page` asks for a page; None where it does not. Raises AccelError where none can be."""
    if value in (None, ""):
        return None
    path = Path(str(value))
    if path.suffix != ".md" or path.is_dir():
        raise AccelError(f"page is {value!r}; it is a file to write, with a name that ends in .md")
    if not path.parent.is_dir():
        raise AccelError(f"page is {value!r}, and there is no folder {str(path.parent)!r}; make it")
    return path


def _kernels(value: Any) -> tuple[str, ...]:
    if value == "all":
        return CHOICES
    words = (*CHOICES, "all", "wan_step")
    chosen = _chosen("kernel", value, words)
    for word in ("all", "wan_step"):
        if word in chosen:
            raise AccelError(f"kernel is {value!r}; {word} stands alone, as in kernel={word}")
    return chosen


def _chosen(name: str, value: Any, known: Sequence[str]) -> tuple[str, ...]:
    """The words of a setting, one or a list; all that are known where nothing is given."""
    if value is None:
        return tuple(known)
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, Sequence) or not words:
        raise AccelError(f"{name} is {value!r}; it is a word or a list of words of {list(known)}")
    for word in words:
        if word not in known:
            raise AccelError(f"{name} {word!r} is unknown; {nearest(str(word), known)}")
    return tuple(dict.fromkeys(words))


def _of_device(
    name: str, config: Mapping[str, Any], known: Mapping[str, Sequence[str]], kind: str
) -> tuple[str, ...]:
    """The words of a setting that a kind of device has; one of another names the reason."""
    every = tuple(dict.fromkeys(word for words in known.values() for word in words))
    if config[name] is None:
        return tuple(known[kind])
    chosen = _chosen(name, config[name], every)
    for word in chosen:
        if word not in known[kind]:
            raise AccelError(
                f"{name} {word!r} is not for this device, which is {kind}; take some of"
                f" {', '.join(known[kind])}"
            )
    return chosen


def _cases(config: Mapping[str, Any], kind: str) -> tuple[Case, ...]:
    """Every shape in each of its dtypes, or in those that `dtype` asks for instead."""
    shapes = config.get("shapes")
    if isinstance(shapes, Mapping) and set(shapes) > set(BACKENDS):
        own = ", ".join(str(name) for name in shapes if name not in BACKENDS)
        raise AccelError(
            f"shapes has {own} beside the shapes of each device; take shapes=none with shapes of"
            " your own, or name a group, as in shapes=cpu"
        )
    if isinstance(shapes, Mapping) and set(shapes) == set(BACKENDS):
        shapes = shapes[kind]  # what `shapes=auto` means on this device
    if not isinstance(shapes, Mapping) or not shapes:
        raise AccelError(
            f"shapes is {shapes!r}; choose a group as in shapes=real, or give one of your own:"
            " shapes=none '+shapes.mine={heads: 8, tokens: 4096, dim: 64}'"
        )
    cases = []
    for shape, given in shapes.items():
        if not isinstance(given, Mapping):
            raise AccelError(f"shapes.{shape} is {given!r}; it is a table with {', '.join(SIZES)}")
        for name in given:
            if name not in (*SIZES, "batch", "dtypes"):
                known = (*SIZES, "batch", "dtypes")
                raise AccelError(f"shapes.{shape}.{name} is unknown; {nearest(str(name), known)}")
        sizes = {"batch": 1, **given}
        for name in ("batch", *SIZES):
            check_whole(f"shapes.{shape}.{name}", sizes.get(name), 1)
        if sizes["dim"] > 256:
            raise AccelError(f"shapes.{shape}.dim is {sizes['dim']}; kernels take at most 256")
        asked = config["dtype"]
        own_dtypes = given.get("dtypes", "bfloat16")
        dtypes = _chosen("dtype", own_dtypes if asked is None else asked, tuple(DTYPES))
        cases += [
            Case(shape=str(shape), dtype=dtype, **{n: sizes[n] for n in ("batch", *SIZES)})
            for dtype in dtypes
        ]
    return tuple(cases)
