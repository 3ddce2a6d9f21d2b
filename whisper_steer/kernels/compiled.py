"""The edit as one operator that torch.compile takes as a whole: inside it, the kernels run as they do
outside.

Registered with torch when this module is imported (kernels.edit does so when it is being compiled).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .arguments import Change


@torch.library.custom_op("whisper_steer::edit", mutates_args=())
def edit(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor,
    W_dec: Tensor,
    values: Tensor,
    gate: Tensor | None,
    mode: str,
    amount: float,
    floor: bool,
) -> Tensor:
    return dispatch.edit(x, W_enc, b_enc, theta, W_dec, Change(mode, values, amount, floor), gate, None)


@edit.register_fake
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor,
    W_dec: Tensor,
    values: Tensor,
    gate: Tensor | None,
    mode: str,
    amount: float,
    floor: bool,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
