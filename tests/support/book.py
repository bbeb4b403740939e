"""The book's blocks of code, and a folder in which they run: what a reader has, made tiny.

Names of the Hub are folders of tiny models under the same path, published data sets a few generated rows, every
training takes four steps, and comparisons draw no pictures; the blocks themselves are as they stand. What a block goes
on from and does not make itself (a model, a task, a posterior) is made when it is first named.
"""

from __future__ import annotations

import ast
import builtins
import glob
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertModel, TrainingArguments

import bayeslora as bl
from bayeslora.cli import build, main
from bayeslora.cli.parse import parse
from support.preferences import reward_model
from support.tiny import VOCABULARY, gaussian, make_base, make_tokenizer

NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
PARSED = ("demo", "lm-eval", "serve", "verify")
"""Verbs of which only the options are read: they take minutes, need published tasks, or a server."""
LOOP = re.compile(r"for (\w+) in (\S+); do (.+); done")
STEPS = 4
CAUSAL = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M", "org/model")
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and why it is not run."""

    language: str
    text: str
    line: int
    reason: str


def blocks(page: Path) -> list[Block]:
    """The blocks of Python and of the shell."""
    found, reason = [], ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block" and (marked := NOT_RUN.fullmatch(token.content.strip())):
            reason = marked[1]
        elif token.type == "fence":
            if token.info in ("python", "bash"):
                found.append(Block(token.info, token.content, (token.map or [0])[0] + 1, reason))
            reason = ""
        elif token.nesting == 0 and token.type != "inline":
            reason = ""
    return found


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """What stands on standard input and the words of each command of a block of the shell."""
    for line in text.replace("\\\n", " ").splitlines():
        if loop := LOOP.fullmatch(line.partition("   #")[0]):
            for path in sorted(glob.glob(loop[2])):
                yield from commands(loop[3].replace(f"${loop[1]}", path))
            continue
        words = shlex.split(line, comments=True)
        said = ""
        if "|" in words:
            at = words.index("|")
            assert words[0] == "echo", line
            said, words = " ".join(words[1:at]) + "\n", words[at + 1 :]
        if words:
            yield said, words


def run_command(said: str, words: list[str]) -> None:
    """Run a command in this process."""
    program, *rest = words
    if program == "cat":
        assert all(Path(name).read_text(encoding="utf-8") for name in rest), words
        return
    assert program == "bayeslora", f"{words}: only bayeslora runs here; mark the block"
    if rest[0] in PARSED:
        module = __import__(f"bayeslora.cli.{rest[0].replace('-', '_')}", fromlist=["Options"])
        parse(module.Options, rest[1:], verb=rest[0], examples=module.EXAMPLES)
        return
    if rest[0] in ("train", "fit", "evaluate", "compare"):
        rest += ["--resamples", "20"]
    if rest[0] == "compare" and "--methods" in rest and "--plan" not in rest:
        rest += ["--seeds", "0", "--draws", "3"]
    sys.stdin = io.StringIO(said)
    assert main(rest) == 0, words


# --- the folder -------------------------------------------------------------------------------------------------------


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def question(number: int) -> str:
    return f"bag holds {number % 10} red, {number * 7 % 10} blue."


def published(repository: str, config: str | None = None, *, split: str, **_: object) -> datasets.Dataset:
    """Twelve rows with the columns of a known task, in the place of what the Hub has."""
    name, rows = repository.rpartition("/")[2], []
    for k in range(12):
        text, other = question(k + len(split)), {"text": [" red", " dark green"], "label": ["A", "B"]}
        rows.append(
            {
                "sst2": {"text": text, "label": k % 2},
                "trec": {"text": text, "coarse_label": k % 6},
                "openbookqa": {"question_stem": text, "choices": other, "answerKey": "AB"[k % 2]},
                "ai2_arc": {"question": text, "choices": other, "answerKey": "AB"[k % 2]},
                "mmlu": {"question": text, "choices": ["red", "blue", "gold", "old"], "answer": k % 4},
            }[name]
        )
    return datasets.Dataset.from_list(rows)


def save_models() -> None:
    """Write a tiny model for each name that the book gives."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, 512
    for name in CAUSAL:
        model = make_base("llama")
        model.config.max_position_embeddings = 512
        with torch.no_grad():
            for weight in model.parameters():  # as wide as a trained model's, so that answers depend on the adapter
                weight.mul_(16 if weight.ndim > 1 else 1)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **size)).save_pretrained(ENCODER)
    tokenizer.save_pretrained(ENCODER)


def save_data() -> None:
    """Write the files of one's own data that the book names."""
    for split, count in (("train", 16), ("test", 8)):
        write_lines(
            Path("reviews", f"{split}.jsonl"), [{"review": question(k), "stars": k % 3 + 1} for k in range(count)]
        )
        quiz = [
            {"q": question(k), "a": "red", "b": "blue", "c": "gold", "d": "old", "answer": "ABCD"[k % 4]}
            for k in range(count)
        ]
        write_lines(Path("quiz", f"{split}.jsonl"), quiz)
        pairs = [{"premise": question(k), "hypothesis": "red.", "label": ("no", "yes")[k % 2]} for k in range(count)]
        write_lines(Path("nli", f"{split}.jsonl"), pairs)
    Path("reviews.csv").write_text("review,stars\na gripping film,3\na dull film,1\n", encoding="utf-8")
    for name in ("new", "rows", "unlabelled"):
        write_lines(Path(f"{name}.jsonl"), [{"question": question(k), "choices": ["red", "blue"]} for k in range(6)])


def furnish(page: str) -> None:
    """Make the working folder what the blocks of a page expect, for a process that ends with them."""
    datasets.load_dataset = published
    # they take most of a tiny comparison's time, and have tests of their own
    vars(build)["write_pictures"] = lambda *_: []
    full = TrainingArguments.__post_init__

    def short(self: TrainingArguments) -> None:
        self.max_steps, self.use_cpu, self.report_to, self.disable_tqdm = STEPS, True, "none", True
        full(self)

    TrainingArguments.__post_init__ = short
    save_models()
    save_data()
    if re.search(r"bayeslora .*\brun\b|\"run/posterior\"", page) and not re.search(r"--out run\b", page):
        trained = ["train", "--model", CAUSAL[0], "--task", "openbookqa", "--readout", "likelihood", "--out", "run"]
        run_command("", ["bayeslora", *trained, "--method", "ivon"])
    if "members/" in page:
        words = ["train", "--model", CAUSAL[0], "--task", "openbookqa", "--readout", "likelihood", "--method", "map"]
        run_command("", ["bayeslora", *words, "--member", "0", "--out", "members/0"])
        for k in range(1, 5):
            shutil.copytree("members/0", f"members/{k}")
    if re.search(r"fit adapter|\"adapter\"", page):
        model = get_peft_model(make_base("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.base_model.model.config._name_or_path = model.peft_config["default"].base_model_name_or_path = CAUSAL[0]
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained("adapter")


# --- what blocks go on from -------------------------------------------------------------------------------------------

SETTING = """
import torch
import bayeslora as bl
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
"""
"""Imports that a block may leave out."""


def causal() -> Any:
    """A causal language model with an adapter whose B is not zero, loaded by its name."""
    model, _ = bl.load_model(CAUSAL[0], dropout=0.1, rank=2, target_modules=["q_proj", "v_proj"], dtype=torch.float32)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def given() -> dict[str, Callable[[Callable[[str], Any]], Any]]:
    """What a block may name without having made it, each by what makes it of the others."""
    return {
        "model": lambda of: causal(),
        "base": lambda of: AutoModelForCausalLM.from_pretrained(CAUSAL[0]),
        "name": lambda of: CAUSAL[0],
        "tokenizer": lambda of: make_tokenizer(),
        "task": lambda of: bl.load_task("openbookqa", readout="likelihood"),
        "split": lambda of: of("task").test,
        "args": lambda of: TrainingArguments("args", save_strategy="no", learning_rate=1e-2),
        "method": lambda of: bl.Swag(),
        "posterior": lambda of: gaussian(of("model")),
        "any_posterior": lambda of: of("posterior"),
        "posterior_of_map": lambda of: bl.Point(of("posterior").mean, of("posterior").origin),
        "prediction": lambda of: bl.predict(of("model"), of("posterior"), of("task").test, draws=3),
        "other": lambda of: bl.predict(of("model"), of("posterior"), of("task").validation, draws=3),
        "rows": lambda of: datasets.Dataset.from_list(
            [{"prompt": question(k), "completion": " red"} for k in range(8)]
        ),
        "pairs": lambda of: datasets.Dataset.from_list(
            [{"prompt": question(k), "chosen": " red", "rejected": " blue"} for k in range(8)]
        ),
        "reward_model": lambda of: reward_model(),
        "texts": lambda of: [question(k) for k in range(6)],
        "SFTTrainer": lambda of: __import__("trl").SFTTrainer,
        "data": lambda of: [torch.ones(2, 3)] * 2,
        "loader": lambda of: of("data"),
        "loss_of": lambda of: lambda model, batch: model(input_ids=batch.long(), labels=batch.long()).loss,
    }


def free_names(tree: ast.Module) -> list[str]:
    """The names that a block uses, in order."""
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]


def run_python(text: str, namespace: dict[str, Any], line: int, page: str) -> None:
    """Run a block in the page's namespace, with what it goes on from."""
    makers = given()
    tree = ast.parse(text, page)
    ast.increment_lineno(tree, line)
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assigned_first = bound & {
        n.id for s in tree.body[:1] if isinstance(s, ast.Assign) for n in s.targets if isinstance(n, ast.Name)
    }

    def of(name: str) -> Any:
        if name not in namespace:
            namespace[name] = makers[name](of)
        return namespace[name]

    for name in free_names(tree):
        if name in makers and name not in assigned_first and not hasattr(builtins, name):
            of(name)
    exec(compile(tree, page, "exec"), namespace)


def run_page(page: Path) -> None:
    """Run the blocks of a page in their order, in the working folder."""
    text = page.read_text(encoding="utf-8")
    furnish(text)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(SETTING, namespace)
    for block in blocks(page):
        if block.reason:
            continue
        if block.language == "python":
            run_python(block.text, namespace, block.line, page.name)
        else:
            for said, words in commands(block.text):
                run_command(said, words)


def run_notebook(path: Path) -> None:
    """Run the cells of a notebook in the working folder, on the tiny encoder."""
    from bayeslora.cli.demo import model

    furnish("")
    model.demo_encoder = lambda: Path(ENCODER)  # type: ignore[assignment, misc]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, {cell['id']}", "exec"), namespace)
