"""Projector of representation alignment (REPA, Yu et al., arXiv 2410.06940): image tokens -> features of an encoder.

A backbone that is trained with REPA has one as its `projector`, in place of the identity; nothing else uses it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .configs import ProjectorConfig
from .layers import Declaration, OutputLinear

# Never zeros: the cosine of a zero vector has no meaningful gradient.
DECLARATIONS = (
    Declaration("projector.fc1.weight", "fan_in", role="output", inner=True),
    Declaration("projector.*.bias", "zeros"),
    Declaration("projector.*.weight", "fan_in"),
)


class Projector(nn.Module):
    """Three linear layers with SiLU between them: tokens [B, N, D] -> [B, N, config.features]."""

    def __init__(self, width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.fc1 = OutputLinear(width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.hidden)
        self.fc3 = nn.Linear(config.hidden, config.features)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.silu(self.fc1(tokens))  # [B, N, hidden]
        # A copy: a linear layer returns a view, and FSDP2 warns of views among the root's outputs.
        return self.fc3(F.silu(self.fc2(hidden))).clone()  # [B, N, features]
