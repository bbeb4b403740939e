"""Types that several rooms share; shape annotations cost nothing at run time unless ``jaxtyping`` is installed.

Legend of the dimension names used everywhere: S draws, N examples, C classes or choices, B batch, T tokens, R rank,
I inputs, O outputs, K snapshots, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = object
    try:
        from jaxtyping import Bool, Float, Int
    except ModuleNotFoundError:
        from torch import Tensor

        class _Shaped:
            def __class_getitem__(cls, item):
                return Tensor

        Bool = Float = Int = _Shaped

__all__ = ["Bool", "Float", "Int", "Tokenizer"]
