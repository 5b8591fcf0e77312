"""Performer: softmax attention through positive orthogonal random features (FAVOR+).

    phi(x) = exp(w_i^T x - |x|^2 / 2) / sqrt(m), i = 1..m      E[phi(q)^T phi(k)] = exp(q^T k)
    Y = phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1)              cost in N: linear, N·m

What depends on a query alone cancels, so this is attention to m keys, the features, and is computed as such:

    Y = softmax(Q W^T + b) X,   b_i = log sum_n phi_i(k_n),   X_i = sum_n phi_i(k_n) v_n / sum_n phi_i(k_n)

Choromanski et al. 2021 (arXiv 2009.14794), section 2.3 (positive features), 2.4 (orthogonal features) and appendix B.

*Names:* ``num_features`` = m (the paper's Theta(D log D) is 266 at D = 64); ``features`` = the rows w_i, a saved
buffer, or with ``learned_features`` parameters of each head, beside ``feature_bias``, the log of their weights.

*Differs:* nothing is added to the features, since no sum can vanish: the largest exponent of the keys is taken per
image, head and feature, and that of the queries per token, so no output depends on the other images of the batch. The
features are drawn from a seed and are the same for all heads. Sums run over blocks of tokens with a running maximum, as
in online softmax, so that N x m features never exist at once; for long sequences, training computes the features of a
block again for its gradient. Without gradients, torch's fused attention computes the softmax over features. Exponents
and sums are in float32 at least, products with values in the dtype of the values, or in float32 for float16.

Queries and keys are centred, which changes nothing in expectation and makes the estimate much less noisy: with c the
mean query and u a vector taken from all keys,

    q^T k = (q - c)^T (k - u) + c^T k + q^T u

whose last term is the same for all keys, so it cancels, and c^T k is known: the features estimate the first term only.
u is the mean of the keys under the weights exp(c^T k), what the mean query sees.

Learned features can start where a trained model's queries and keys are (``init_from_inputs``) instead of anywhere. A
feature tells most about a pair at w = q + k, where the integrand exp(w^T (q + k) - (|q|^2 + |k|^2 + |w|^2) / 2) is
largest. So they start at such sums for pairs that attend to each other, a little shrunk, with -|w|^2 / 2 as the log of
their weights.

A mask of keys, of booleans or any numbers that are added to their logits, weighs the features of the keys. Masked
tokens enter neither the sums and their maximum nor the means above, so the result is that without these tokens.

*Speed:* a whole ViT-Ti is 0.78, 1.11, 1.25 and 3.38 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.89, 1.16, 1.68 and 4.00 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N tokens, h heads, D head width, m features.
"""

from typing import Optional

import torch
from torch import nn

from .._checks import InputError, check_choice, check_integer
from ._favor import centres, favor_attention, orthogonal_features
from ._layout import TokenLayout
from ._mechanism import AttentionMechanism, AttentionShape

DEFAULT_FEATURES = 64
# Factor of the sums at which learned features start: the best of 0.5 to 1 (examples/results/convert_tried.csv).
SHRINK = 0.8


class PerformerAttention(AttentionMechanism):
    """Performer attention.

    Args:
        num_features: m; None: 64.
        feature_seed: seed of the features.
        redraw_interval: in training, draw new features after this many forward passes; 0: never. Keep it 0 with a
            moving average of the weights (timm's ``--model-ema``): it averages the features too, and a mean of random
            features is shorter than each of them.
        learned_features: each head has features of its own, and learns them and their weights.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "Performer attention"
    source = "Choromanski et al. 2021, arXiv 2009.14794"
    uses_grid = False
    supports_dropout = False
    supports_key_mask = True
    takes_sequences = True
    supports_key_bias = True
    candidates = tuple(dict(num_features=m) for m in (32, 64, 128, 256))
    # features are as large as queries and keys, where weights are a hundredth
    learning_rates = {"features": 30.0, "feature_bias": 4.0}
    __jit_unused_properties__ = ("counts_passes",)

    def __init__(
        self,
        shape: AttentionShape,
        num_features: Optional[int] = None,
        feature_seed: int = 0,
        redraw_interval: int = 0,
        learned_features: bool = False,
    ) -> None:
        super().__init__(shape)
        num_features = DEFAULT_FEATURES if num_features is None else num_features
        check_integer("num_features", num_features, 1)
        check_integer("feature_seed", feature_seed, 0, 2**63 - 1)
        check_integer("redraw_interval", redraw_interval, 0)
        check_choice("learned_features", learned_features, (True, False))
        if learned_features and redraw_interval:
            raise InputError(
                f"redraw_interval={redraw_interval}: learned_features=True keeps its features; allowed is 0"
            )
        self.num_features = num_features
        self.feature_seed = feature_seed
        self.redraw_interval = redraw_interval
        self.learned_features = learned_features
        self.features: torch.Tensor
        self.feature_bias: Optional[nn.Parameter] = None
        if learned_features:
            self.features = shape.parameter(shape.num_heads, num_features, shape.head_dim)
            self.feature_bias = shape.parameter(shape.num_heads, 1, num_features)
        else:
            size = (num_features, shape.head_dim)
            self.register_buffer("features", torch.empty(size, device=shape.device, dtype=shape.dtype))
        if redraw_interval:
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64, device=shape.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.features.copy_(self.draw(self.feature_seed))  # each head's, if they learn
        if self.feature_bias is not None:
            self.feature_bias.zero_()
        if self.redraw_interval:
            self.passes.zero_()

    def draw(self, seed: int) -> torch.Tensor:
        """Random features of a seed, (m, D)."""
        return orthogonal_features(self.num_features, self.features.shape[-1], seed)

    @property
    def counts_passes(self) -> bool:
        return self.redraw_interval > 0

    def count_pass(self) -> None:
        """Count a forward pass in training, and draw new features after ``redraw_interval`` of them."""
        if self.training and self.redraw_interval:
            self.passes += 1
            draws, rest = divmod(int(self.passes), self.redraw_interval)
            if rest == 0:
                # a new tensor: the old one may still be wanted for a backward pass
                self.features = self.draw(self.feature_seed + draws).to(self.features)

    @torch.no_grad()
    def init_from_inputs(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Put learned features where queries and keys (B, h, N, D) of a trained model are; others stay as they are.

        For each feature a query is drawn, and a key by the attention that the query pays.
        """
        if self.feature_bias is None:
            return
        q, k = q.float(), k.float()
        c, u = centres(q, k)
        generator = torch.Generator("cpu").manual_seed(self.feature_seed)
        _, h, N, D = q.shape
        shape = (h, self.num_features, 1)
        queries = torch.randint(N, shape, generator=generator, device="cpu").to(q.device)
        # inverse of the distribution function, since a generator of one device draws for no other
        level = torch.rand(shape, generator=generator, device="cpu").to(q.device)
        for image in range(len(q)):
            part = slice(image, None, len(q))
            take = queries[:, part].expand(-1, -1, D)
            logits = torch.matmul(q[image].gather(1, take), k[image].transpose(1, 2)) * D**-0.5
            keys = (logits.softmax(2).cumsum(2) < level[:, part]).sum(2, keepdim=True).clamp_(max=N - 1)
            sums = (q - c)[image].gather(1, take) + (k - u)[image].gather(1, keys.expand_as(take))
            self.features[:, part] = (SHRINK * D**-0.25 * sums).to(self.features.dtype)
        self.feature_bias.copy_(-0.5 * self.features.square().sum(2).unsqueeze(1))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        key_bias: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        return favor_attention(q, k, v, self.features, feature_bias=self.feature_bias, key_bias=key_bias)
