"""Block mass from the means of a few cells of each block (SubBlock)."""

from dataclasses import dataclass

import torch

from accel.estimators.contract import ESTIMATORS, Call, Estimator, Selection, check_fraction
from accel.kind import register
from accel.ranking import top_blocks

__all__ = ["SubBlock"]


@register(ESTIMATORS, "sub_block")
@dataclass(frozen=True, slots=True)
class SubBlock(Estimator):
    """Log-sum-exp over cells of a pair of blocks, `ceil(keep * n)` of the n visual ones per row.

    SubBlock (SGLang): blocks are cut in `q_cells` and `kv_cells` equal runs of tokens, and the mass
    of a pair is `ln sum_ab n_a n_b exp(s mean(q_a)·mean(k_b))` with n the valid tokens of a cell.
    Cells without any drop out; whole cells weigh alike, as all of them do in the method. With one
    cell of each it is the product of block means, which cells of keys improve more than cells of
    queries.
    """

    keep: int | float
    q_cells: int = 4
    kv_cells: int = 4

    def __post_init__(self) -> None:
        check_fraction(self, "keep")
        for name in ("q_cells", "kv_cells"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is a number of cells, at least 1, got {value!r}")

    @property
    def work(self) -> str:
        return f"{self.kind}/{self.q_cells}x{self.kv_cells}"

    def check_block(self, block: tuple[int, int]) -> None:
        if block[0] % self.q_cells or block[1] % self.kv_cells:
            raise ValueError(
                f"block {tuple(block)} cannot be cut in {self.q_cells} x {self.kv_cells} cells;"
                " take numbers that divide both sizes"
            )

    def select_in(self, call: Call) -> Selection:
        self.check_block(call.blocking.block)
        rows, columns = call.blocking.block
        q, q_count = call.means(call.q, rows // self.q_cells)
        k, k_count = call.means(call.k, columns // self.kv_cells)
        weight = q_count.log()[:, :, :, None] + k_count.log()[:, :, None]
        kv_heads = k.shape[1]
        group = q.shape[1] // kv_heads
        fill = (
            call.blocking.q_blocks * self.q_cells - q.shape[2],
            call.blocking.kv_blocks * self.kv_cells - k.shape[2],
        )
        scores = []
        for h in range(kv_heads):  # one at a time: their logits are many times the scores
            logits = call.products(q[:, h * group : (h + 1) * group], k[:, h : h + 1]) + weight
            logits = torch.nn.functional.pad(logits, (0, fill[1], 0, fill[0]), value=-torch.inf)
            cells = logits.unflatten(3, (-1, self.kv_cells)).unflatten(2, (-1, self.q_cells))
            scores.append(cells.logsumexp((3, 5)))
        return Selection(top_blocks(torch.cat(scores, 1), self.keep, call.blocking))
