"""OpenVLA-OFT's L1 regression head."""

from __future__ import annotations

from torch import Tensor, nn

from specprune_ros.models.base import ActionHead


class ResidualBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return x + self.ffn(x)


class L1RegressionHead(ActionHead):
    """One action per A consecutive hidden states.

    Args:
        width: C, width of a hidden state.
        action_dim: A.
        hidden_width: width of the MLP; C in the published checkpoints.
        blocks: residual blocks; 2 in the published checkpoints.

    Source: openvla-oft 213c5ff, action_heads.py (parameter names as in `action_head--*.pt`, after
        the `module.model.` prefix).
    """

    def __init__(self, width: int, action_dim: int, hidden_width: int, blocks: int = 2):
        super().__init__()
        self.action_dim = action_dim
        self.layer_norm1 = nn.LayerNorm(width * action_dim)
        self.fc1 = nn.Linear(width * action_dim, hidden_width)
        self.relu = nn.ReLU()
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(hidden_width) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(hidden_width)
        self.fc2 = nn.Linear(hidden_width, action_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """[L * A, C] hidden states -> [L, A] normalised actions (no clip)."""
        x = hidden.reshape(-1, self.action_dim * hidden.shape[-1])
        x = self.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))
