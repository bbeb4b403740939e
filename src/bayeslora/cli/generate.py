"""``bayeslora generate``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.cli.options import ModelOptions, TransformOptions, option, run_option
from bayeslora.errors import InputError

EXAMPLES = """examples:
  bayeslora generate run --prompt "Question: What do plants breathe in?\\nAnswer:"
  bayeslora generate run --prompt "Name a river." --chat --draws 10
  bayeslora generate run --prompt "Name a river." --chat --each --do-sample
  bayeslora generate run --input prompts.txt --json

Every token is taken from the average of the draws; --each gives one answer a draw, in groups that say the same."""


@dataclass(kw_only=True)
class Options(ModelOptions, TransformOptions):
    """Write text from a posterior, with each answer's uncertainty."""

    run: str = run_option('name what to generate from: bayeslora generate RUN --prompt "…"')
    prompt: list[str] = option([], "Prompts; \\n in them begins a new line.")
    input: str = option("", "File with one prompt a line; -: standard input.")
    chat: bool = option(False, "Put each prompt as a user's message through the chat template.")
    each: bool = option(False, "One answer a draw.")
    draws: int = option(5, "Draws from the posterior.", least=1)
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
    from bayeslora.cli.build import draws_of, load_transformed, model_for
    from bayeslora.cli.progress import own_progress
    from bayeslora.prediction.generation import generate, generate_each

    settings: dict[str, Any] = {"do_sample": options.do_sample, "stop_strings": options.stop or None}
    if options.do_sample:
        settings |= {"temperature": options.sampling_temperature, "top_p": options.top_p}
    if options.beams != 1:
        settings["num_beams"] = options.beams
    with own_progress():
        posterior = load_transformed(options.run, options)
        model, tokenizer = model_for(posterior, options, None)
        given = [[{"role": "user", "content": p}] if options.chat else p for p in prompts]
        draws = draws_of(options, options.draws)
        how: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": options.max_new_tokens, **settings}
        if options.each:
            several = generate_each(model, posterior, given, draws, **how)
        else:
            single = generate(model, posterior, given, draws, **how)
    for number, prompt in enumerate(prompts):
        if options.each:
            _print_each(prompt, several[number], options.json)
        elif options.json:
            print(json.dumps({"prompt": prompt, **single[number].to_dict()}, ensure_ascii=False))
        else:
            answer = single[number]
            disagreement = float(answer.mutual_information.mean()) if answer.token_ids else 0.0
            print(answer.text.strip())
            print(f"  [perplexity {answer.perplexity:.2f}, disagreement of the draws {disagreement:.3f} nats a token]")


def _print_each(prompt: str, answers: Any, as_json: bool) -> None:
    """Print the answers of the draws to one prompt."""
    if as_json:
        rows = [
            {"text": a.text, "draw": k, "group": g, "log_likelihood": a.log_likelihood}
            for a, k, g in zip(answers.answers, answers.draws, answers.groups, strict=True)
        ]
        summary = {"semantic_entropy": answers.semantic_entropy, "predictive_entropy": answers.predictive_entropy}
        print(
            json.dumps({"prompt": prompt, "best": answers.best().text, **summary, "answers": rows}, ensure_ascii=False)
        )
        return
    for group, share in enumerate(answers.shares.tolist()):
        first = answers.answers[answers.groups.index(group)]
        print(f"{share:4.0%}  {' '.join(first.text.split())}")
    print(f"  [semantic entropy {answers.semantic_entropy:.3f} nats over {len(answers.answers)} answers]")


def _prompts(options: Options) -> list[str]:
    """Return the prompts, or refuse."""
    found = [p.replace("\\n", "\n") for p in options.prompt]
    if options.input:
        path = Path(options.input)
        if options.input != "-" and not path.is_file():
            raise InputError(f"there is no file {path}")
        text = sys.stdin.read() if options.input == "-" else path.read_text(encoding="utf-8")
        found += [line for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError("give at least one prompt: --prompt TEXT or --input FILE")
    return found
