"""The evaluation harness on a posterior: against its own plain model, draw by draw, and against values by hand."""

import json
import math
import sys
from collections import Counter

import pytest
import torch
from support.tiny import COLOURS, gaussian, make_model, make_split, make_task, make_tokenizer, same_state, state_of

from bayeslora.cli import main
from bayeslora.errors import InputError
from bayeslora.integrations.lm_eval_calibration import add_calibration, calibration, choice_log_probs
from bayeslora.params import swapped
from bayeslora.posteriors import Linearised, Mixture, Point, Scaled
from bayeslora.posteriors.transforms import restricted
from bayeslora.prediction import likelihoods, predict
from bayeslora.prediction.generation import generate

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from bayeslora.integrations.lm_eval import PosteriorLM, evaluate_tasks, find_tasks

YAML = """task: marbles
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
PAIRS = [
    *[("bag holds 3 red, 4 blue. Answer:", f" {colour}") for colour in COLOURS],
    ("bag holds 5 green.", " red"),
    ("", "bag holds 7 old gold"),
    *[("bag holds 3 red, 4 blue. Answer:", f" {colour} red blue") for colour in COLOURS],
]
TEXTS = ["bag holds 3 red, 4 blue.", " ".join(str(k * k * k % 11 % 10) for k in range(190)) + " red", "red"]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def posterior(model):
    return gaussian(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one task of the harness, of thirteen rows."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"question": e.text, "choices": list(e.choices), "label": e.label} for e in bags()]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "marbles.yaml").write_text(YAML.replace("FILE", str(path / "rows.jsonl")))
    return path


def bags():
    return make_split("test", 13, 2, classes=False)


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=own, idx=k) for k, own in enumerate(arguments)]


def plain(model, **settings):
    return HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=4, **settings)


def ours(model, posterior, draws=1, **settings):
    return PosteriorLM(model, posterior, draws, tokenizer=make_tokenizer(), **settings)


def by_draw(model, posterior, draws, answers, **settings):
    """What the harness's own model answers with each draw in the adapter's place."""
    found = []
    for k in range(draws):
        with swapped(model, posterior.draw(k)):
            found.append(answers(plain(model, **settings)))
    return found


def log_mean(values):
    return (torch.tensor(values, dtype=torch.float64).logsumexp(0) - math.log(len(values))).tolist()


def sample(scores, target, texts=None, **more):
    texts = texts or [f" {k}" for k in "abcdef"[: len(scores)]]
    return {
        "filtered_resps": [(s, False) for s in scores], "arguments": [("q", t) for t in texts], "target": target,
        "filter": "none", **more,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_point_answers_as_the_harness_does(kind):
    model = make_model(kind)
    lm, other = ours(model, Point(gaussian(model).mean)), plain(model)
    asked = requests("loglikelihood", PAIRS)
    found, wanted = lm.loglikelihood(asked), other.loglikelihood(asked, disable_tqdm=True)
    assert [v for v, _ in found] == pytest.approx([v for v, _ in wanted], abs=1e-4)
    assert [g for _, g in found] == [g for _, g in wanted]
    texts = requests("loglikelihood_rolling", [(t,) for t in TEXTS])
    assert lm.loglikelihood_rolling(texts) == pytest.approx(other.loglikelihood_rolling(texts), rel=1e-5)


def test_draws_average_the_likelihood_of_whole_texts(model, posterior):
    asked = requests("loglikelihood", PAIRS)
    wanted = log_mean(
        by_draw(model, posterior, 5, lambda lm: [v for v, _ in lm.loglikelihood(asked, disable_tqdm=True)])
    )
    found = [v for v, _ in ours(model, posterior, 5).loglikelihood(asked)]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_draws_average_the_likelihood_of_whole_documents_over_their_windows(model, posterior):
    texts = requests("loglikelihood_rolling", [(t,) for t in TEXTS])
    assert len(make_tokenizer()(TEXTS[1])["input_ids"]) > 128
    wanted = log_mean(by_draw(model, posterior, 3, lambda lm: lm.loglikelihood_rolling(texts)))
    assert ours(model, posterior, 3).loglikelihood_rolling(texts) == pytest.approx(wanted, rel=1e-5)


def test_contexts_that_are_too_long_lose_their_beginning_as_in_the_harness(model, posterior):
    asked = requests("loglikelihood", [("bag holds 3 red. " * 9, f" {colour}") for colour in COLOURS])
    wanted = log_mean(
        by_draw(
            model, posterior, 2, lambda lm: [v for v, _ in lm.loglikelihood(asked, disable_tqdm=True)], max_length=20
        )
    )
    found = [v for v, _ in ours(model, posterior, 2, max_length=20).loglikelihood(asked)]
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("budget", [1, 40, 200])
def test_answers_do_not_depend_on_the_batches(model, posterior, budget):
    asked = requests("loglikelihood", PAIRS)
    wanted, found = (ours(model, posterior, 4, token_budget=n).loglikelihood(asked) for n in (4096, budget))
    assert [v for v, _ in found] == pytest.approx([v for v, _ in wanted], abs=1e-4)
    assert [g for _, g in found] == [g for _, g in wanted]


def test_batches_that_do_not_fit_into_memory_are_halved(model, posterior):
    asked = requests("loglikelihood", PAIRS)
    wanted = ours(model, posterior, 4).loglikelihood(asked)
    lm, sizes = ours(model, posterior, 4), []
    lm.loglikelihood(asked)  # the trial of stacking is made

    def short(_, args, inputs):
        sizes.append(len(args[0]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.get_base_model().model.layers[0].register_forward_pre_hook(short, with_kwargs=True)
    found = lm.loglikelihood(asked)
    hook.remove()
    assert max(sizes) > 2
    assert [v for v, _ in found] == pytest.approx([v for v, _ in wanted], abs=1e-4)
    assert [g for _, g in found] == [g for _, g in wanted]


def test_all_draws_of_a_few_questions_are_one_pass(model, posterior):
    alike = [pair for pair in PAIRS if pair[1].strip() in COLOURS[:2]]  # rows of another length are another batch
    lm, asked, passes = ours(model, posterior, 4, token_budget=4096), requests("loglikelihood", alike), []
    lm.loglikelihood(asked)  # the trials are made
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        lm.loglikelihood(asked)
    finally:
        hook.remove()
    assert len(passes) == 1


def test_draws_with_noise_in_the_last_layer_share_the_first(model, posterior):
    last = restricted(posterior, 1)
    lm, asked, seen = ours(model, last, 4, token_budget=4096), requests("loglikelihood", PAIRS), []
    lm.loglikelihood(asked)
    layers = model.get_base_model().model.layers
    hooks = [layer.register_forward_hook(lambda _, args, out: seen.append(len(args[0]))) for layer in layers]
    try:
        found = [v for v, _ in lm.loglikelihood(asked)]
    finally:
        for hook in hooks:
            hook.remove()
    assert seen[1] == 4 * seen[0]
    wanted = log_mean(by_draw(model, last, 4, lambda lm: [v for v, _ in lm.loglikelihood(asked, disable_tqdm=True)]))
    assert found == pytest.approx(wanted, abs=1e-4)


def test_choices_of_a_question_share_its_context():
    pairs = [((1, 2, 3), (k, k + 1)) for k in range(4)] + [((1, 2), (5,))]
    rows, numbers = likelihoods.gathered(pairs, 100)
    assert [len(row.answers) for row in rows] == [4, 1]
    assert numbers == [[0, 1, 2, 3], [4]]
    rows, numbers = likelihoods.gathered(pairs, 4)
    assert numbers == [[0, 1], [2, 3], [4]]


def test_is_greedy_says_whether_the_average_of_the_draws_would_write_the_text(model, posterior):
    tokenizer, prompt = make_tokenizer(), "bag holds 7 red, 4 blue. Answer:"
    answer = generate(model, posterior, [prompt], 4, tokenizer=tokenizer, max_new_tokens=4)[0]
    words = tokenizer.convert_ids_to_tokens(answer.token_ids)
    text, wrong = "".join(words), "".join([*words[:-1], " red"])
    assert tokenizer(prompt + text)["input_ids"] == [*tokenizer(prompt)["input_ids"], *answer.token_ids]
    asked = requests("loglikelihood", [(prompt, text), (prompt, wrong)])
    assert [g for _, g in ours(model, posterior, 4).loglikelihood(asked)] == [True, False]


def test_a_models_state_is_what_it_was(model, posterior):
    model.train()
    before = state_of(model)
    lm = ours(model, posterior, 3)
    lm.loglikelihood(requests("loglikelihood", PAIRS))
    lm.generate_until(requests("generate_until", [("bag holds", {"until": ["."], "max_gen_toks": 3})]))
    assert same_state(model, before)
    model.eval()


def test_generated_text_is_that_of_generate_and_ends_where_the_task_says(model, posterior):
    lm, prompts = ours(model, posterior, 3), ["bag holds 3 red", "Question: bag"]
    answers = generate(model, posterior, prompts, 3, tokenizer=make_tokenizer(), max_new_tokens=6)
    asked = [(p, {"until": [], "max_gen_toks": 6}) for p in prompts]
    assert lm.generate_until(requests("generate_until", asked)) == [a.text for a in answers]
    stop = next(token for token in answers[0].tokens[1:] if token.strip())
    (short,) = lm.generate_until(requests("generate_until", [(prompts[0], {"until": stop, "max_gen_toks": 6})]))
    assert short == answers[0].text.split(stop)[0]
    long = requests("generate_until", [("red " * 300, {"until": ["."], "max_gen_toks": 6})])
    assert len(lm.generate_until(long)) == 1


def test_the_same_prompt_asked_for_twice_is_sampled_twice_and_written_once_if_greedy(model, posterior):
    lm = ours(model, posterior, 2)
    settings = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12, "until": []}
    one, other, third = lm.generate_until(
        requests("generate_until", [("bag holds", settings), ("bag holds", settings), ("red", settings)])
    )
    assert one != other
    assert third
    greedy = [("bag holds", {"temperature": 0, "max_gen_toks": 12})] * 2
    assert len(Counter(lm.generate_until(requests("generate_until", greedy)))) == 1


def test_a_task_gives_what_predict_and_the_harness_give(model, posterior, folder):
    names, manager = find_tasks(["marbles"], str(folder))
    results = evaluate_tasks(ours(model, posterior, 4), names, manager=manager, bootstrap_iters=0)
    log_p, labels = choice_log_probs(results["samples"]["marbles"])
    split = bags()
    assert labels.tolist() == split.labels.tolist()
    assert results["results"]["marbles"]["acc,none"] == pytest.approx(
        float((log_p.argmax(-1) == labels).double().mean())
    )
    for name, value in calibration(results["samples"]["marbles"]).items():
        assert results["results"]["marbles"][f"{name},none"] == value
        assert results["higher_is_better"]["marbles"][name] is False
    by_hand = []
    for example in split:
        asked = [(f"Question: {example.text}\nAnswer:", f" {choice}") for choice in example.choices]
        scored = by_draw(
            model, posterior, 4,
            lambda lm, asked=asked: [v for v, _ in lm.loglikelihood(requests("", asked), disable_tqdm=True)],
        )  # fmt: skip
        by_hand.append(torch.tensor(log_mean(scored)).softmax(0)[example.label].item())
    assert results["results"]["marbles"]["nll,none"] == pytest.approx(-sum(map(math.log, by_hand)) / 13, abs=1e-4)


def test_a_point_has_the_accuracy_of_the_harness(model, posterior, folder):
    from lm_eval import simple_evaluate

    names, manager = find_tasks(["marbles"], str(folder))
    settings = {"bootstrap_iters": 0, "limit": 7}
    found = evaluate_tasks(ours(model, Point(posterior.mean)), names, manager=manager, **settings)
    wanted = simple_evaluate(plain(model), tasks=names, task_manager=manager, **settings)
    assert found["results"]["marbles"]["acc,none"] == wanted["results"]["marbles"]["acc,none"]
    assert found["n-samples"]["marbles"]["effective"] == 7


def test_calibration_has_the_values_by_hand():
    samples = [
        sample([math.log(0.3), math.log(0.1)], 0),  # 0.75, 0.25
        sample([math.log(0.2), math.log(0.2), math.log(0.6)], "b", [" a", " b", " c"]),  # 0.2, 0.2, 0.6
    ]
    found = calibration(samples)
    assert found["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.2)) / 2)
    assert found["brier"] == pytest.approx((2 * 0.25**2 + 0.2**2 + 0.8**2 + 0.6**2) / 2)
    assert found["ece"] == pytest.approx((0.25 + 0.6) / 2)


def test_calibration_follows_the_normalisation_by_hand_or_is_refused():
    texts = [" wet", " not wet"]  # 3 and 7 characters
    by_length = choice_log_probs([sample([-3.0, -6.0], 0, texts)], "characters")[0][0]
    assert by_length.tolist() == pytest.approx(torch.tensor([-3 * 4 / 3, -6 * 4 / 7]).log_softmax(0).tolist())
    pair = sample([-3.0, -6.0, -2.0, -7.0], 0, texts * 2, acc_mutual_info=1.0)
    against = choice_log_probs([pair], "unconditional")[0][0]
    assert against.tolist() == pytest.approx(torch.tensor([-1.0, 1.0]).log_softmax(0).tolist())
    by_tokens = choice_log_probs([sample([-3.0, -6.0], 0, texts)], "tokens", lambda _, text: len(text.split()))[0][0]
    assert by_tokens.tolist() == pytest.approx(torch.tensor([-3.0, -3.0]).log_softmax(0).tolist())
    for kind in ("tokens", "unconditional"):
        results = {
            "results": {"one": {}}, "configs": {"one": {"output_type": "multiple_choice"}},
            "samples": {"one": [sample([-3.0, -6.0], 0, texts) | {"filter": "none"}]},
        }  # fmt: skip
        assert f"normalisation={kind!r}" in add_calibration(results, normalisation=kind)["not_calibrated"]["one"]


@pytest.mark.parametrize(
    ("own", "label"),
    [
        (sample([0.0, -1.0], 1), 1),
        (sample([0.0, -1.0], "1"), 1),
        (sample([0.0, -1.0], " b"), 1),
        (sample([0.0, -1.0], [1]), 1),
        (sample([0.0, -1.0], "the end", [" the end"] * 2, acc=1.0), 0),
        (sample([0.0, -1.0], "the end", [" the end"] * 2, acc=0.0), 1),
        (sample([0.0, -1.0, -5.0, -5.0], 1, [" a", " b"] * 2, acc_mutual_info=1.0), 1),
        (
            {
                "filtered_resps": [["-1.0", "False"], ["0.0", "True"]], "target": "1",
                "arguments": {f"gen_args_{k}": {"arg_0": "q", "arg_1": t} for k, t in enumerate("ab")},
            },
            1,
        ),
    ],
)  # fmt: skip
def test_the_right_choice_is_found_as_the_harness_names_it(own, label):
    log_p, labels = choice_log_probs([own])
    assert log_p.shape == (1, 2)
    assert labels.tolist() == [label]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([], "no logged samples"),
        ([sample([0.0, 1.0], [0, 1])], "sample 0 has no single known answer"),
        ([sample([0.0], 0), sample([0.0, 1.0], -100)], "sample 1 has no single known answer"),
        ([sample([0.0, 1.0], "elsewhere")], "no single known answer among its 2 choices"),
        ([{"filtered_resps": ["a text"], "target": "x", "arguments": [("q", {})]}], "no log-likelihoods of choices"),
    ],
)
def test_samples_without_a_right_choice_are_refused(samples, expected):
    with pytest.raises(InputError, match=expected):
        calibration(samples)


def test_tasks_without_calibration_are_named_with_the_reason():
    results = {
        "results": {"many": {"acc,none": 1.0}, "text": {}},
        "configs": {"many": {"output_type": "multiple_choice"}, "text": {"output_type": "generate_until"}},
        "samples": {"many": [sample([0.0, 1.0], [0, 1])], "text": [{"filter": "none"}]},
    }
    found = add_calibration(results)
    assert found["results"] == results["results"]
    assert "sample 0" in found["not_calibrated"]["many"]
    assert list(found["not_calibrated"]) == ["many"]


def test_posteriors_without_weights_and_texts_without_tokens_are_refused(model, posterior):
    scaling = {f"{of}.{part}": torch.ones(1) for of in ("draws", "mean") for part in ("weight", "bias")}
    with pytest.raises(InputError, match="not weights"):
        ours(model, Linearised(posterior))
    with pytest.raises(InputError, match="temperature was fitted"):
        ours(model, Scaled(posterior, scaling))
    with pytest.raises(InputError, match="draws must be at least 0"):
        ours(model, posterior, -1)
    lm = ours(model, posterior, max_length=8)
    with pytest.raises(InputError, match="has 9 tokens"):
        lm.loglikelihood(requests("loglikelihood", [("red", " red" * 9)]))
    with pytest.raises(InputError, match="asks for 8 new tokens"):
        lm.generate_until(requests("generate_until", [("red", {"max_gen_toks": 8})]))


def test_an_ensemble_of_points_has_as_many_draws_as_members(model, posterior):
    members = Mixture(tuple(Point(posterior.draw(k)) for k in range(2)))
    lm = ours(model, members, 10)
    assert lm.draws == 2
    asked = requests("loglikelihood", PAIRS)
    wanted = log_mean(
        by_draw(model, posterior, 2, lambda lm: [v for v, _ in lm.loglikelihood(asked, disable_tqdm=True)])
    )
    assert [v for v, _ in lm.loglikelihood(asked)] == pytest.approx(wanted, abs=1e-4)


def test_predict_agrees_where_its_choices_are_whole_texts(model, posterior):
    task = make_task(readout="likelihood")
    prediction = predict(model, posterior, task.test, 3, tokenizer=make_tokenizer(), mean=False)
    from bayeslora.tasks.templates import answer_text, render, resolve_format

    form = resolve_format(task.test.format, "likelihood")
    lm = ours(model, posterior, 3)
    for n, example in enumerate(task.test):
        asked = [(render(example, form), answer_text(example, c, "likelihood")) for c in range(len(example.choices))]
        pairs = [(lm.tok_encode(context), lm.tok_encode(text)) for context, text in asked]
        found, _ = lm.draw_log_likelihoods(pairs)
        wanted = prediction.log_probs[:, n, : len(asked)]
        assert torch.allclose(found.log_softmax(1).float(), wanted, atol=1e-4)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A posterior with its base model on disk."""
    from support.tiny import make_base

    path = tmp_path_factory.mktemp("run")
    make_base("llama").save_pretrained(path / "base")
    make_tokenizer().save_pretrained(path / "base")
    model = make_model()
    model.active_peft_config.base_model_name_or_path = str(path / "base")
    gaussian(model).save_pretrained(path / "posterior")
    return path / "posterior"


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["lm-eval", *map(str, words)]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("bayeslora")
    return sentence


@pytest.mark.slow
def test_the_verb_runs_a_task_and_keeps_its_numbers(capsys, run_folder, folder, tmp_path):
    out = tmp_path / "numbers.json"
    words = [
        "lm-eval",
        run_folder,
        "--tasks",
        "marbles",
        "--include-path",
        folder,
        "--limit",
        "5",
        "--dtype",
        "float32",
    ]
    assert main([*map(str, words), "--draws", "3", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("marbles", "ece", "nll", "brier", "acc"))
    kept = json.loads(out.read_text())
    assert kept["posterior"]["draws"] == 3
    assert {"ece,none", "nll,none", "brier,none", "acc,none"} <= kept["results"]["marbles"].keys()
    assert "is there already" in refused(capsys, *words[1:], "--out", out)
    assert main([*map(str, words), "--mean", "--out", str(out), "--overwrite"]) == 0
    mean = json.loads(out.read_text())
    assert mean["posterior"]["draws"] == 1
    assert mean["results"]["marbles"]["nll,none"] != kept["results"]["marbles"]["nll,none"]
    assert main([*map(str, words), "--draws", "0", "--out", str(out), "--overwrite"]) == 0
    again = json.loads(out.read_text())
    assert again["posterior"] == mean["posterior"]
    assert again["results"] == mean["results"]


def test_what_the_verb_cannot_use_is_refused_in_one_sentence(capsys, run_folder, folder, tmp_path, monkeypatch):
    own = ["--include-path", folder]
    assert "name what to evaluate" in refused(capsys, "--tasks", "marbles")
    assert "name what to evaluate" in refused(capsys, run_folder)
    assert "--draws must be a number of at least 0" in refused(
        capsys, run_folder, "--tasks", "marbles", "--draws", "-1"
    )
    assert "--limit must be a number" in refused(capsys, run_folder, "--tasks", "marbles", "--limit", "-1")
    assert "no folder" in refused(capsys, run_folder, "--tasks", "marbles", "--include-path", tmp_path / "none")
    assert "is not a posterior" in refused(capsys, tmp_path, "--tasks", "marbles", *own)
    monkeypatch.setitem(sys.modules, "bayeslora.integrations.lm_eval", None)
    monkeypatch.delitem(sys.modules, "bayeslora.integrations.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'bayeslora[lm-eval]'" in refused(capsys, run_folder, "--tasks", "marbles", *own)


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_the_closest(capsys, run_folder):
    assert "no task 'arc_eazy'; did you mean arc_easy" in refused(capsys, run_folder, "--tasks", "arc_eazy")
