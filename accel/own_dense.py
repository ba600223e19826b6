"""Dense calls by accel's own kernel: when a plan's are, and how."""

from jaxtyping import Bool, Float
from torch import Tensor

from accel.geometry import Site
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.obstacles import misfit, unexplained
from accel.plan import Plan
from accel.run_state import Run

__all__ = ["OwnDense", "full_mask"]

Heads = Float[Tensor, "batch heads tokens dim"]
KeyHeads = Float[Tensor, "batch kv_heads kv_tokens dim"]
Valid = Bool[Tensor, "batch kv_tokens"]


class OwnDense:
    """The dense calls of one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def makes(
        self, site: Site, run: Run, q: Heads, obstacle: str | None, valid: Valid | None
    ) -> bool:
        """Whether a call is made by accel's own kernel."""
        if self._plan.dense != "kernel" or run.where is None or obstacle is not None:
            return False
        if run.spread is not None and run.spread.pieces is None:
            return False
        if valid is None:
            return True
        # the layout says what an attention mask hides
        plain = run.layout is not None and not run.layout.padded_inside
        return plain and misfit(site, run.here, q) is None and unexplained(site, run, valid) is None

    def __call__(
        self, site: Site, run: Run, masked: bool, q: Heads, k: KeyHeads, v: KeyHeads
    ) -> Heads:
        """The output; masked: the padding of the run's layout is left out."""
        mask, length = full_mask(run, self._plan.block, q, k), None
        if masked:
            assert run.layout is not None
            length = run.layout.valid_length
        precision = self._plan.precision_of(site.name)
        return sparse_attention(q, k, v, mask, kv_length=length, precision=precision)


def full_mask(run: Run, block: tuple[int, int], q: Heads, k: KeyHeads) -> BlockMask:
    """The mask of a call that keeps everything; made once for each size of a run."""
    lengths = (q.shape[1], q.shape[2], k.shape[2])
    key = (lengths, q.device)
    if key not in run.full:
        run.full[key] = BlockMask.full(
            lengths[0], block=block, q_length=lengths[1], kv_length=lengths[2], device=q.device
        )
    return run.full[key]
