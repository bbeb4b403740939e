"""Run-time shape checks for the whole suite, and the fixtures that every folder of tests uses."""

from __future__ import annotations

import jaxtyping
import pytest
from transformers import PreTrainedTokenizerFast

# before anything imports them: from here on a wrong shape in these modules is an error
SHAPE_CHECKED = ("metrics", "uncertainty", "prediction", "predict.readouts")
jaxtyping.install_import_hook([f"bayeslora.{name}" for name in SHAPE_CHECKED], "beartype.beartype")

from tiny import KINDS, Kind, make_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]
