"""What quantised bases need that PEFT and bitsandbytes do not do by themselves."""

from __future__ import annotations

import sys

from torch import nn


def unpack_for_training(model: nn.Module) -> None:
    """Undo bitsandbytes' packing of 4-bit weights on the CPU, and keep it from packing them again.

    On CPUs with bfloat16 instructions ``Linear4bit`` packs its weight at the first pass in evaluation mode, and the
    product with a packed weight has no gradient: after an evaluation the layers below would silently stop learning.

    Args:
        model: A model that is to be trained; others than 4-bit on the CPU are left alone.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.support_avx512bf16_for_cpu:
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # saving unpacks in place
