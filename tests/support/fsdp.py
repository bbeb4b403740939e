"""FSDP 2 on CPUs: accelerate knows it for accelerators only, so one without a device of its own is pretended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from accelerate import PartialState
from accelerate.utils import DistributedType

SETTINGS = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What ``accelerate launch --use_fsdp --fsdp_version 2`` puts into the environment."""


@contextmanager
def sharded_models() -> Iterator[None]:
    """Let Trainers of this process, one of a group, train by FSDP 2 for the length of a ``with`` block."""
    backend = "gloo", DistributedType.MULTI_GPU
    with patch.dict(os.environ, SETTINGS), patch.object(PartialState, "_prepare_backend", return_value=backend):
        os.environ.pop("ACCELERATE_USE_CPU", None)
        yield
