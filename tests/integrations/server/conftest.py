"""A server with a tiny model for each file of tests, and the official client."""

import openai
import pytest
from support.serving import running, served


@pytest.fixture(scope="module")
def address(tokenizer):
    with running(served(tokenizer)) as (found, _):
        yield found


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="anything", max_retries=0)
