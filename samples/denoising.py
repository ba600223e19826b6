"""What the trainings of the sample denoisers share: noise levels, rates, and a head that reads the
meaning of tokens.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Muon

__all__ = ["BACKGROUND", "MeaningHead", "noise_levels", "optimisers", "rate_at"]

BACKGROUND = 10  # the label of a token that shows no digit


def noise_levels(size: int, shift: float, random: torch.Generator) -> Tensor:
    """Levels `[size]` in (0, 1), shifted towards noise by `shift`.

    One stratum of the normal per sample, squashed: steadier gradients at batch 2. 15% of the levels
    are uniform before the shift.
    """
    quantile = (torch.randperm(size, generator=random) + torch.rand(size, generator=random)) / size
    base = torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)).sigmoid()
    uniform = torch.rand(size, generator=random)
    base = torch.where(torch.rand(size, generator=random) < 0.15, uniform, base)
    return shift * base / (1 + (shift - 1) * base)


def rate_at(index: int, progress: float) -> float:
    """Share of the learning rate: a warm-up of a hundred steps, falling over the last third."""
    return min((index + 1) / 100, 1.0, 3 * (1 - progress) + 0.01)


class MeaningHead(nn.Module):
    """Reads from the hidden states of one block which digit covers each token, and where.

    read: what of the block's output are the hidden states of the visual tokens.
    """

    def __init__(
        self, block: nn.Module, width: int, read: Callable[[Any], Tensor] = lambda output: output
    ) -> None:
        super().__init__()
        self.read = nn.Linear(width, BACKGROUND + 1 + 2)
        self.hidden: Tensor | None = None
        block.register_forward_hook(
            lambda _block, _inputs, output: setattr(self, "hidden", read(output))
        )

    def forward(self, digits: Tensor, inside: Tensor) -> Tensor:
        """Cross-entropy of `digits` `[b, tokens]` plus the squared error of `inside` `[b, tokens,
        2]` where there is a digit, for the last call of the block.
        """
        found = self.read(F.layer_norm(self.hidden, self.hidden.shape[-1:]))
        named = F.cross_entropy(found[..., :-2].transpose(1, 2), digits)
        shown = (digits != BACKGROUND)[..., None]
        missed = ((found[..., -2:] - inside).square() * shown).sum() / shown.sum().clamp(min=1) / 2
        return named + missed


def optimisers(
    blocks: Iterable[nn.Module], modules: list[nn.Module], muon_rate: float, adam_rate: float
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside the blocks, AdamW for everything else of `modules`."""
    hidden = {
        id(p): p
        for b in blocks
        for n, p in b.named_parameters()
        if p.ndim == 2 and n.endswith("weight")
    }
    rest = [p for m in modules for p in m.parameters() if id(p) not in hidden]
    muon = Muon(hidden.values(), lr=muon_rate, decay=0.01)
    return muon, torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
