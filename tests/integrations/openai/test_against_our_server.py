"""The client of servers of plain adapters, against our own server, which serves each draw as a model."""

import torch
from support.serving import DRAWN, running, served
from support.tiny import gaussian, make_model, make_split

import bayeslora as bl
from bayeslora.integrations.openai.client import Adapters


def test_predictions_are_those_of_the_library(tokenizer):
    model = make_model("llama")
    split = make_split("test", 6, 2, classes=False, readout="likelihood")
    wanted = bl.predict(model, gaussian(model), split, 3, tokenizer=tokenizer)
    with running(served(tokenizer)) as (address, _):
        server = Adapters(address, names=DRAWN)
        found = server.predict(split)
        answers = server.generate_each(["bag holds 3 red"], max_tokens=5, temperature=0)[0]
    torch.testing.assert_close(found.log_probs.exp(), wanted.log_probs.exp(), atol=1e-4, rtol=0)
    own = bl.generate_each(model, gaussian(model), ["bag holds 3 red"], 3, tokenizer=tokenizer, max_new_tokens=5,
                           eos_token_id=None)[0]  # fmt: skip
    assert [a.text for a in answers.answers] == [a.text for a in own.answers]
