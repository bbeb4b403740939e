"""Every method learns on a GPU what it learns on the CPU; the GPU is pretended, see `support.pretended`."""

import pytest
from support.methods_table import DROPOUT, TABLE
from support.pretended import pretended
from support.tiny import arguments, same_params

from bayeslora.prediction import predict
from bayeslora.training.run import fit


@pytest.mark.parametrize("name", [row.param() for row in TABLE.values()])
def test_a_method_learns_on_a_gpu_what_it_learns_on_the_cpu(name, learn, tokenizer, tmp_path):
    wanted = learn(name, TABLE[name].kinds[0])
    model, task = wanted.kind.build(lora_dropout=DROPOUT), wanted.kind.task()
    with pretended(model):
        posterior = fit(model, task, wanted.method, arguments(tmp_path / "run"), tokenizer=tokenizer)
        found = predict(model, posterior, task.test, 2, tokenizer=tokenizer)
    assert same_params(posterior.mean, wanted.posterior.mean)
    assert same_params(posterior.draw(1), wanted.posterior.draw(1))
    assert found.log_probs.shape[1] == len(task.test)
    assert not found.log_probs.isnan().any()
