"""``bayeslora generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.cli.options import RUN, ModelOptions, TransformOptions, option
from bayeslora.errors import InputError

if TYPE_CHECKING:
    from bayeslora.prediction.generation.answers import Answers

EXAMPLES = """examples:
  bayeslora generate run --prompt "Question: What do plants breathe in?\\nAnswer:"
  bayeslora generate run --prompt "Name a river." --chat --draws 10
  bayeslora generate run --prompt "Name a river." --chat --each --do-sample
  bayeslora generate run --input prompts.txt --json

Every token is taken from the average of the draws; --each gives one answer a draw, in groups that say the same."""


@dataclass(kw_only=True)
class Options(ModelOptions, TransformOptions):
    """Write text from a posterior, with each answer's uncertainty."""

    run: str = option("", RUN, required='name what to generate from: bayeslora generate RUN --prompt "…"')
    prompt: list[str] = option([], "Prompts; \\n in them begins a new line.")
    input: str = option("", "File with one prompt a line; -: standard input.")
    chat: bool = option(False, "Put each prompt as a user's message through the chat template.")
    each: bool = option(False, "One answer a draw.")
    draws: int = option(5, "Draws from the posterior; 0: its mean.")
    max_new_tokens: int = option(128, "Most tokens of an answer.", least=1)
    do_sample: bool = option(False, "Sample tokens instead of taking the most probable.")
    sampling_temperature: float = option(1.0, "Temperature of sampled tokens.")
    top_p: float = option(1.0, "Smallest set of tokens with this much probability to sample from.", most=1)
    beams: int = option(1, "Beams; 1: none.", least=1)
    stop: list[str] = option([], "Texts that end an answer.")
    json: bool = option(False, "Print JSON lines with every token's numbers.")


def run(options: Options) -> None:
    """Print the answers."""
    prompts = _prompts(options)
    from bayeslora.cli import build, progress
    from bayeslora.prediction.generation import generate, generate_each
    from bayeslora.prediction.generation.answers import Answer

    settings: dict[str, Any] = {"do_sample": options.do_sample, "stop_strings": options.stop or None}
    if options.do_sample:
        settings |= {"temperature": options.sampling_temperature, "top_p": options.top_p}
    if options.beams != 1:
        settings["num_beams"] = options.beams
    with progress.own_progress():
        posterior = build.load_transformed(options.run, options)
        model, tokenizer = build.model_for(posterior, options, None)
        messages = [[{"role": "user", "content": p}] if options.chat else p for p in prompts]
        settings |= {"tokenizer": tokenizer, "max_new_tokens": options.max_new_tokens}
        draws = build.draws_of(options, options.draws)
        generates: Callable[..., Sequence[Answer | Answers]] = generate_each if options.each else generate
        answers = generates(model, posterior, messages, draws, **settings)
    for prompt, answer in zip(prompts, answers, strict=True):
        if options.json:
            numbers = answer.to_dict() if isinstance(answer, Answer) else _numbers(answer)
            print(json.dumps({"prompt": prompt, **numbers}, ensure_ascii=False))
        elif isinstance(answer, Answer):
            disagreement = float(answer.mutual_information.mean()) if answer.token_ids else 0.0
            print(answer.text.strip())
            print(f"  [perplexity {answer.perplexity:.2f}, disagreement of the draws {disagreement:.3f} nats a token]")
        else:
            _print_groups(answer)


def _numbers(answers: Answers) -> dict[str, object]:
    """Return the answers of the draws to one prompt, ready for JSON."""
    rows = [
        {"text": answer.text, "draw": draw, "group": group, "log_likelihood": answer.log_likelihood}
        for answer, draw, group in zip(answers.answers, answers.draws, answers.groups, strict=True)
    ]
    return {
        "best": answers.best().text,
        "semantic_entropy": answers.semantic_entropy,
        "predictive_entropy": answers.predictive_entropy,
        "answers": rows,
    }


def _print_groups(answers: Answers) -> None:
    """Print the first answer of each group of draws that say the same, with the group's share."""
    for group, share in enumerate(answers.shares.tolist()):
        first = answers.answers[answers.groups.index(group)]
        print(f"{share:4.0%}  {' '.join(first.text.split())}")
    print(f"  [semantic entropy {answers.semantic_entropy:.3f} nats over {len(answers.answers)} answers]")


def _prompts(options: Options) -> list[str]:
    """Return the prompts, or refuse."""
    prompts = [p.replace("\\n", "\n") for p in options.prompt]
    if options.input:
        from bayeslora.tasks.files import read_text

        piped = options.input == "-"
        text = read_text(sys.stdin if piped else Path(options.input), "standard input" if piped else options.input)
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError("give at least one prompt: --prompt TEXT or --input FILE")
    return prompts
