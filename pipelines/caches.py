"""The caches of diffusers that can stand in a comparison: their names, settings and how they run.

A cache reuses what a step before computed: attention outputs (`pab`, `faster_cache`), or what the
blocks added to their input (`fbcache`, `magcache`, `taylorseer`). The defaults below are those of
the papers; where diffusers' own differ, the reason stands beside them. What enables one on a
pipeline is `accel.pipelines.cache_hooks`, which needs diffusers; this file does not.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from accel.errors import AccelError, nearest
from accel.untrusted import finite


@dataclass(frozen=True, slots=True)
class Known:
    """A cache of diffusers.

    options: what can be set, with the values taken otherwise. note: in what it departs from its
    paper here, told beside its results.
    """

    options: Mapping[str, Any]
    note: str = ""


# Ranges of timesteps are those of an evenly spaced schedule, for which both papers chose them:
# (100, 800) is from a fifth to nine tenths of the steps, whatever shift the scheduler has.
CACHES: Mapping[str, Known] = MappingProxyType(
    {
        # Pyramid Attention Broadcast, arXiv 2408.12588: outputs of self-attention serve 2 steps,
        # those of cross-attention, which change least, 6
        "pab": Known(
            {
                "spatial_attention_block_skip_range": 2,
                "cross_attention_block_skip_range": 6,
                "spatial_attention_timestep_skip_range": (100, 800),
                "cross_attention_timestep_skip_range": (100, 800),
            }
        ),
        # FasterCache, arXiv 2410.19355: outputs of self-attention are extrapolated every other
        # step, with a weight that rises from 0 to 1 over the run
        "faster_cache": Known(
            {
                "spatial_attention_block_skip_range": 2,
                "spatial_attention_timestep_skip_range": (-1, 681),
            },
            note="without the part that leaves out the unconditional branch, for which both"
            " branches have to be one batch",
        ),
        # First Block Cache (ParaAttention): the other blocks are skipped while the first one's
        # residual changes by less than the threshold
        "fbcache": Known({"threshold": 0.05}),
        # MagCache, arXiv 2506.09045: skips by calibrated ratios of the residuals' magnitudes
        "magcache": Known({"threshold": 0.06, "max_skip_steps": 3, "retention_ratio": 0.2}),
        # TaylorSeer, arXiv 2503.06923: outputs of attention and feed-forward are extrapolated
        # between full steps; `lite` extrapolates the last layer's alone. diffusers' own choice of
        # modules matches none of Wan, and its factors are kept in bfloat16
        "taylorseer": Known(
            {
                "cache_interval": 5,
                "disable_cache_before_step": 3,
                "disable_cache_after_step": None,
                "max_order": 1,
                "lite": False,
            }
        ),
    }
)


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """A cache with its settings; those that are not given are the defaults of `CACHES`."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in CACHES:
            raise AccelError(f"there is no cache {self.kind!r}; {nearest(self.kind, CACHES)}")
        known = CACHES[self.kind].options
        for name, value in self.options.items():
            if name not in known:
                raise AccelError(
                    f"cache {self.kind!r} has no option {name!r}; {nearest(str(name), known)}"
                )
            _check(f"cache {self.kind!r}: {name}", value, known[name])
        whole = {**known, **self.options}
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in whole.items()}
        object.__setattr__(self, "options", MappingProxyType(plain))

    @classmethod
    def of(cls, what: Any) -> "CacheSpec":
        """From a configuration: a name, or {cache: name, option: value, ...}."""
        if isinstance(what, str):
            return cls(what)
        if isinstance(what, Mapping) and isinstance(what.get("cache"), str):
            return cls(what["cache"], {k: v for k, v in what.items() if k != "cache"})
        raise AccelError(f"a cache is a name or {{cache: name, option: value}}, not {what!r:.80}")

    def to_dict(self) -> dict[str, Any]:
        """What `of` reads, with every option."""
        return {"cache": self.kind, **self.options}

    @property
    def identity(self) -> str:
        """Names the cache and every one of its settings."""
        return json.dumps(self.to_dict(), sort_keys=True)


def _check(name: str, value: Any, default: Any) -> None:
    """Refuse a value of another kind than the default's."""
    if isinstance(default, tuple):
        good = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(finite, value))
        wanted = "two numbers, ascending"
        good = good and value[0] < value[1]
    elif isinstance(default, bool):
        good, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, float):
        good, wanted = finite(value) and value >= 0, "a number, at least 0"
    else:
        good = (type(value) is int and value >= 1) or (value is None and default is None)
        wanted = "a whole number, at least 1"
    if not good:
        raise AccelError(f"{name} is {value!r}; it is {wanted}")
