"""One option for each item under a common limit: the multiple-choice knapsack.

Solved as an integer programme by HiGHS. DiTFastAttnV2 (arXiv 2503.22796) spends an error limit over
the heads of a layer by it, HASTE (arXiv 2605.14513) a budget of computed blocks over all heads of a
model.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from accel.errors import PlanError

__all__ = ["multiple_choice"]

GAP = 1e-4  # of the best gain there can be: beyond, proofs take longer than they are worth


def multiple_choice(
    gains: Float[Tensor, "items options"],
    weights: Float[Tensor, "items options"],
    limit: float,
    allowed: Bool[Tensor, "items options"] | None = None,
) -> list[int]:
    """The option of every item: the largest sum of gains whose weights add up to `limit` at most.

    weights: at least 0. allowed: options that may be taken, all by default. PlanError where even
    the lightest options are too heavy.
    """
    items, options = gains.shape
    open_to = torch.ones_like(gains, dtype=torch.bool) if allowed is None else allowed
    least = weights.double().masked_fill(~open_to, torch.inf).amin(1)
    if float(least.sum()) > limit * (1 + 1e-9) + 1e-12:
        raise PlanError(
            f"the limit of {limit:.4g} cannot be met: the least there is adds up to"
            f" {float(least.sum()):.4g}; raise it, or add cheaper candidates"
        )
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    # the solver's tolerances are absolute: bring both sums to the size of 1
    gain, weight = gains.double().flatten(), weights.double().flatten()
    gain = gain / gain.abs().max().clamp_min(1e-300)
    unit = limit if limit > 0 else float(weight.max().clamp_min(1e-300))
    columns = np.arange(items * options)
    once = csr_matrix((np.ones(items * options), (columns // options, columns)))
    result = milp(
        -gain.numpy(),
        integrality=np.ones(items * options),
        bounds=Bounds(0, open_to.flatten().double().numpy()),
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint((weight / unit).numpy()[None], ub=limit / unit),
        ],
        options={"mip_rel_gap": GAP},
    )
    if result.x is None:
        raise PlanError(f"no option can be chosen: {result.message}")
    return torch.from_numpy(result.x).view(items, options).argmax(1).tolist()
