"""Non-parametric layers that keep a few bits for the backward (paper, section 3.2).

Each computes exactly what the layer that it replaces computes. Where no gradient is needed it is that layer, its `inference_form`:
nothing is coded.
"""

import torch
import torch.nn.functional as F
from torch import nn

from s2a_fx import ops
from s2a_fx.nn.random_numbers import Drawing


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class QuantizedGELU(nn.Module):
    """GELU, eq. (10) to (12). `approximate`: `none` or `tanh`, as in `nn.GELU`; `bits`: per element kept."""

    def __init__(self, approximate: str = "none", bits: int = 4) -> None:
        super().__init__()
        self.approximate = approximate
        self.bits = bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.gelu(x, self.approximate, self.bits)[0] if _needs_grad(x) else self.inference_form(x)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}, bits={self.bits}"


class QuantizedSiLU(nn.Module):
    """SiLU (Swish), eq. (10) to (12) with x stretched. `bits`: per element kept."""

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.silu(x, self.bits)[0] if _needs_grad(x) else self.inference_form(x)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class QuantizedReLU(nn.Module):
    """ReLU that keeps one bit an element; its gradient is exact."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.relu(x)[0] if _needs_grad(x) else self.inference_form(x)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)


class QuantizedSoftmax(nn.Module):
    """Softmax along `dim`, eq. (7) to (9). `bits`: per element kept."""

    def __init__(self, dim: int = -1, bits: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.bits = bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.softmax(x, self.dim, self.bits)[0] if _needs_grad(x) else self.inference_form(x)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, bits={self.bits}"


class QuantizedSoftmaxMatmul(Drawing):
    """`dropout(softmax(scores)) @ value` as one operator, so that the map is kept once and coded, eq. (7) to (9).

    Args:
        dropout_p: of the dropout on the map; drawn in train mode only.
        bits: per element of the map.
    """

    def __init__(self, dropout_p: float = 0.0, bits: int = 4) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.bits = bits

    def forward(self, scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Scores (..., N, K) and value (..., K, D) give (..., N, D)."""
        dropout_p = self.dropout_p if self.training else 0.0
        if not _needs_grad(scores, value):
            return torch.matmul(F.dropout(torch.softmax(scores, -1), dropout_p, dropout_p > 0), value)
        return ops.softmax_matmul(scores, value, dropout_p, self.bits)[0]

    def inference_form(self, scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.matmul(torch.softmax(scores, -1), value)

    def draws(self) -> bool:
        return self.dropout_p > 0

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}, bits={self.bits}"


class QuantizedAttention(Drawing):
    """`F.scaled_dot_product_attention` that keeps q, k, v and a coded map, eq. (7) to (9).

    Args:
        dropout_p: of the dropout on the map, in train mode.
        eval_dropout_p: the same in eval mode; not 0 for models that pass a constant.
        is_causal, scale: as in `F.scaled_dot_product_attention`.
        bits: per element of the map.
    """

    def __init__(
        self,
        dropout_p: float = 0.0,
        eval_dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        bits: int = 4,
    ) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.eval_dropout_p = eval_dropout_p
        self.is_causal = is_causal
        self.scale = scale
        self.bits = bits

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Query (B, heads, N, D), key and value (B, heads, K, D), mask broadcast to (B, heads, N, K), give (B, heads, N, D)."""
        dropout_p = self.dropout_p if self.training else self.eval_dropout_p
        if not _needs_grad(query, key, value, mask):
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, self.is_causal, scale=self.scale)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return ops.attention(query, key, value, mask, dropout_p, self.is_causal, scale, self.bits)[0]

    def inference_form(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, self.eval_dropout_p, self.is_causal, scale=self.scale)

    def draws(self) -> bool:
        return self.dropout_p > 0

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}, is_causal={self.is_causal}, scale={self.scale}, bits={self.bits}"
