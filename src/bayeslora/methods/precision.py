"""The adapter in float32, where a Trainer put it into half precision.

A step of AdamW is about as large as the learning rate. A number in bfloat16 with eight binary digits swallows what is
below a five-hundredth of it, so that at the small rates at which a spread is learned most of A never moves. PEFT keeps
adapters in float32 for that reason, beside a base in any precision; TRL casts those of 8- and 4-bit bases to bfloat16.
When PEFT reads a checkpoint into such an adapter it puts new parameters in float32 in its place, which an optimiser
that is there does not know.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.params import lora_parameters

HALF = (torch.float16, torch.bfloat16)
"""Types that are put into float32."""


def widen(model: nn.Module | None, optimizer: Any = None) -> None:
    """Put the trained LoRA parameters of a model into float32, in place, if no step was taken with them yet.

    PEFT's layers take their input into the type of A and bring their result back into that of the base. Whole modules
    that are trained (a head) do not, and stay as they are.

    Args:
        model: The model that is to be trained; without an adapter it is left alone.
        optimizer: Its optimiser, if there is one.
    """
    if not isinstance(model, PeftModel):
        return
    if getattr(getattr(optimizer, "optimizer", optimizer), "state", None):
        return
    for name, p in lora_parameters(model).items():
        if "lora_" in name and p.requires_grad and p.dtype in HALF and type(p) in (nn.Parameter, Tensor):
            p.data = p.data.float()
