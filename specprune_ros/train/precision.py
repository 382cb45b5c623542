"""Training in bfloat16: products in it, weights, sums and norms in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.backends.cuda import (
    allow_fp16_bf16_reduction_math_sdp,
    fp16_bf16_reduction_math_sdp_allowed,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from specprune_ros.train.config import PRECISIONS


@contextlib.contextmanager
def reduced(device: torch.device, name: str) -> Iterator[None]:
    """Within it, a forward computes in that precision; the backward follows it.

    On a CPU with AVX512-BF16 or AMX products are several times faster so. Its fused attention is
    not: the backward of short sequences takes ten times as long as plain products do, so those
    are what attention is made of there.

    Args:
        device: of the network.
        name: 'float32' or 'bfloat16'.

    Raises:
        ValueError: another name.
    """
    if name not in PRECISIONS:
        raise ValueError(f'precision is one of {", ".join(PRECISIONS)}, not {name}')
    if name == 'float32':
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
        if device.type == 'cpu':
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            before = fp16_bf16_reduction_math_sdp_allowed()
            stack.callback(allow_fp16_bf16_reduction_math_sdp, before)
            allow_fp16_bf16_reduction_math_sdp(True)  # else it computes in float32 after all
        yield
