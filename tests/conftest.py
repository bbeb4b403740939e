"""For the whole suite: run-time shape checks, no network, no deprecated calls, and common fixtures."""

import contextlib
import gc
import itertools
import logging
import os
import re
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # reports and counts; read on import

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
    "prediction.fused",
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

from support.offline import sitecustomize  # noqa: E402
from support.tiny import KINDS, make_tokenizer  # noqa: E402

from bayeslora.cli import terminal  # noqa: E402

terminal.HIDDEN = ()  # the command line hides what is to be an error here

os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(sitecustomize.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)


class Deprecations(logging.Handler):
    """Keeps what libraries say of deprecated arguments in their logs, where pytest's filters do not see it."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if re.search(r"deprecated|will be removed", message := record.getMessage()):
            self.messages.append(f"{record.name}: {message}")


DEPRECATIONS = Deprecations()
BEGUN = itertools.count()  # tests
QUICK_VARIANTS = 3  # of a test function: what `-m "not slow"` runs
for name in ("transformers", "peft", "trl", "accelerate", "datasets", "huggingface_hub", "torch"):
    logging.getLogger(name).addHandler(DEPRECATIONS)


@pytest.fixture(scope="session")
def reached():
    """Name the file in which tries to reach other machines are noted, by this process and those that it starts."""
    with tempfile.NamedTemporaryFile("r") as file, pytest.MonkeyPatch.context() as patch:
        patch.setenv(sitecustomize.REACHED, file.name)
        yield file


@pytest.fixture(scope="session")
def deprecations():
    return DEPRECATIONS


@pytest.fixture(autouse=True)
def nothing_outside_and_nothing_deprecated(request, reached, monkeypatch):
    """Fail a test in which something looked for the network, unless it is marked so, or a library said "deprecated"."""
    if request.node.get_closest_marker("network"):
        monkeypatch.setenv(sitecustomize.ALLOWED, "1")
    yield
    tried, said = reached.read(), [*DEPRECATIONS.messages]
    DEPRECATIONS.messages.clear()
    assert (tried, said) == ("", [])


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark a test's many variants as slow but for a few, by the hash of their names; not where files are looked at."""
    variants = defaultdict(list)
    for item in items:
        if item.path.parent != Path(__file__).parent and not item.get_closest_marker("slow"):
            variants[item.path, getattr(item, "originalname", item.name)].append(item)
    for of_one in variants.values():
        for item in sorted(of_one, key=lambda item: zlib.crc32(item.name.encode()))[QUICK_VARIANTS:]:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup():
    """Take what has gathered out of garbage collection now and then: the Trainer runs it in full at every training."""
    if next(BEGUN) % 50 == 0:
        gc.collect()
        gc.freeze()
