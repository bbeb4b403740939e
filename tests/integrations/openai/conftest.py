"""What the tests of the client share."""

import pytest
from support.fake_vllm import Stand
from support.tiny import gaussian, make_model, make_tokenizer


@pytest.fixture
def stand():
    """A stand-in that answers as vLLM does."""
    model = make_model("llama")
    return Stand(model, gaussian(model), make_tokenizer(), software="vllm")
