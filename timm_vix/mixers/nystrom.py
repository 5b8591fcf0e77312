"""Nyström attention: softmax attention reconstructed from m landmarks.

    F = softmax(Q K~^T / sqrt(D))        (N, m)
    A = softmax(Q~ K~^T / sqrt(D))       (m, m)
    O = softmax(Q~ K^T / sqrt(D)) V      (m, D)  what exact attention gives for the landmarks' queries
    Y = F A^+ O                                  cost in N: linear, N·m

Xiong et al. 2021 (arXiv 2102.03902), equation 13 and section 3.2.

TODO
Shapes: B images, N = P + H·W tokens, h heads, D head width, m landmarks (P prefix tokens and the cells).
"""

from typing import Optional

import torch
from timm.layers import register_notrace_function
from torch import nn
from torch.nn import functional as F

from ._slot import AttentionMixer, Grid, admit, cell_grid, check_integer, check_number, pool_patches

DEFAULT_LANDMARKS = 49
KERNEL_SIZE = 5


@torch.fx.wrap
@register_notrace_function
def solve_landmarks(
    q: torch.Tensor, k: torch.Tensor, exact: torch.Tensor, ridge: float, iterations: int
) -> torch.Tensor:
    with torch.autocast(q.device.type, enabled=False):
        q, k, out = q.float(), k.float(), exact.float()
        A = torch.softmax(torch.matmul(q, k.transpose(2, 3)) * q.shape[3] ** -0.5, dim=3)
        At = A.transpose(2, 3)
        eye = torch.eye(A.shape[3], device=A.device)
        M = torch.matmul(At, A) + ridge * eye
        Z = eye * (2.0 / (M.sum(3, keepdim=True).amax(2, keepdim=True) + ridge))
        for _ in range(iterations):
            Z = torch.matmul(Z, 2.0 * eye - torch.matmul(M, Z))
        return torch.matmul(Z, torch.matmul(At, out)).to(exact.dtype)


class NystromAttention(AttentionMixer):
    """Nyström attention in the slot."""

    def __init__(
        self,
        attn: nn.Module,
        grid: Grid,
        num_prefix_tokens: int,
        rope: Optional[nn.Module] = None,
        num_landmarks: Optional[int] = None,
        pinv_iterations: int = 12,
        ridge: float = 0.003,
        conv_residual: bool = False,
    ) -> None:
        super().__init__(attn, grid, num_prefix_tokens, rope)
        if num_landmarks is None:
            num_landmarks = min(DEFAULT_LANDMARKS, grid[0] * grid[1])
        check_integer("num_landmarks", num_landmarks, 1, grid[0] * grid[1], "patch tokens")
        check_integer("pinv_iterations", pinv_iterations, 1)
        check_number("ridge", ridge, 0)
        self.num_landmarks = num_landmarks
        self.pinv_iterations = pinv_iterations
        self.ridge = float(ridge)
        self.cells = cell_grid(num_landmarks, grid)
        weight = self.proj.weight
        self.conv: Optional[nn.Module] = None
        if conv_residual:
            self.conv = nn.Conv2d(
                self.attn_dim,
                self.attn_dim,
                KERNEL_SIZE,
                padding=KERNEL_SIZE // 2,
                groups=self.attn_dim,
                bias=False,
                device=weight.device,
                dtype=weight.dtype,
            )

    def before_forward(self, grid: Grid) -> None:
        super().before_forward(grid)
        self.cells = cell_grid(self.num_landmarks, grid)

    def options(self) -> dict:
        return {"num_landmarks": self.num_landmarks}

    def residual(self, v: torch.Tensor) -> torch.Tensor:
        """Depthwise convolution of the values over the patch grid: (B, h, N, D) -> (B, h, N, D), 0 for prefix tokens."""
        B, h, _, D = v.shape
        height, width = self.grid
        P = self.num_prefix_tokens
        assert self.conv is not None
        patches = v[:, :, P:].permute(0, 1, 3, 2).reshape(B, h * D, height, width)
        local = self.conv(patches).reshape(B, h, D, height * width).transpose(2, 3)
        return F.pad(local, (0, 0, P, 0))

    def forward(
        self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False
    ) -> torch.Tensor:
        x = admit(x, attn_mask, is_causal, self.num_tokens)
        q, k, v = self.project(x, 0, 3)
        q, k = self.rotate(q), self.rotate(k)
        landmarks = pool_patches(x, self.num_prefix_tokens, self.grid, self.cells)
        landmark_q, landmark_k = self.project(landmarks, 0, 2)
        landmark_q, landmark_k = self.rotate(landmark_q, self.cells), self.rotate(landmark_k, self.cells)
        exact = F.scaled_dot_product_attention(landmark_q, k, v)
        values = solve_landmarks(landmark_q, landmark_k, exact, self.ridge, self.pinv_iterations)
        y = F.scaled_dot_product_attention(
            q, landmark_k, values, dropout_p=self.attn_drop.p if self.training else 0.0
        )
        if self.conv is not None:
            y = y + self.residual(v)
        return self.merge(y, x)
