"""Run-time shape checks for the whole suite, and the fixtures that every folder of tests uses."""

import contextlib
import gc

import jaxtyping
import pytest
import torch

# before anything imports them: from here on a wrong shape in these modules is an error; `metrics.prediction` is not
# among them, since it looks at shapes itself and refuses them in words
SHAPE_CHECKED = (
    "metrics.classification",
    "metrics.uncertainty",
    "prediction.batching",
    "prediction.readouts",
    "prediction.stacking",
    "prediction.passes",
    "prediction.likelihoods",
    "prediction.generation.averaging",
    "prediction.generation.decoding",
    "prediction.linearised",
    "methods.regularisers",
    "prediction.jacobians",
)
jaxtyping.install_import_hook([f"bayeslora.{name}" for name in SHAPE_CHECKED], "beartype.beartype")

# torch.compile imports setuptools, which fails where another library has imported distutils before it
with contextlib.suppress(ModuleNotFoundError):
    import setuptools  # noqa: F401

torch.set_num_threads(1)  # tiny models are slower on several threads, which wait for each other

from support.tiny import KINDS, make_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def pytest_collection_finish():
    """Take what is imported by now out of garbage collection, which the Trainer runs in full before every training."""
    gc.collect()
    gc.freeze()
