"""Mutated data and configuration files through what `bayeslora train`, `predict` and `--config` read them with.

Each of the inputs is a small valid CSV, TSV, JSON Lines, JSON or YAML file with one to four mutations, of its values,
its text or its bytes; a few are pipes, devices, folders and links. It must be refused by an `InputError` of one
sentence that says where, or give a task that can be used: every label is the choice that its cell names, every prompt
becomes tokens, and its rows can be written as JSON in UTF-8. Time and memory of each are limited.

    python benchmarks/soak/data_files.py --inputs 100000 --seed 0 --json data_files.json
"""

from __future__ import annotations

import argparse
import collections
import csv
import gzip
import io
import json
import math
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import finish, row
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bayeslora.cli import compare, train
from bayeslora.cli.build import build_arguments
from bayeslora.cli.data import build_task, split_like
from bayeslora.cli.options import TaskOptions
from bayeslora.cli.parse import parse
from bayeslora.cli.settings import build_method, build_methods
from bayeslora.errors import InputError
from bayeslora.prediction.encoding import encode
from bayeslora.tasks import Format, Rows, Split, read_rows

SECONDS = 5.0
MEMORY = 2**30
KINDS = ("csv", "tsv", "jsonl", "json", "yaml")
DEEP = json.loads("[" * 60 + "]" * 60)
CELLS = [
    None,
    "",
    "  ",
    "nan",
    "NaN",
    "inf",
    "None",
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
    0,
    1,
    2,
    -1,
    10**20,
    10**400,
    1.0,
    2.0,
    0.5,
    1e300,
    "1.0",
    "0.0",
    "0.5",
    "1e3",
    "9" * 5000,
    "-",
    "٣",
    "²",
    "\ud800",
    "a\ud83dz",
    "\0",
    "\u2028",
    "\ufeff",
    "é😀",
    "\r",
    "\n",
    '"',
    "a,b",
    "a;b",
    "a\tb",
    [],
    ["a"],
    ["a", "b"],
    ["a", "a"],
    [1, 2],
    [[], {}],
    {},
    {"a": 1},
    DEEP,
    {"text": ["a", "b"], "label": ["1", "2"]},
    {"text": ["a", "b"], "label": ["1", "1"]},
    {"text": "ab"},
    "[" * 5000,
    '["a","b"]',
    '["a", NaN]',
    "['a', 'b']",
    "x" * 200_000,
    "{text}",
    "{0}",
    "{text.__class__}",
    "A",
    "B",
    "Z",
    "yes",
    "no",
    "red",
]
"""What a cell may become."""
WORDS = [
    '"',
    "'",
    ",",
    ";",
    "\t",
    "{",
    "}",
    "[",
    "]",
    ":",
    "\\",
    "\0",
    "\r",
    "\n",
    "\n\n",
    "NaN",
    "Infinity",
    "-",
    "1e999",
    '"a": 1, "a": 2,',
    '{"label": 0, "label": 1},',
    '"\\ud800"',
    "\\udfff",
    "\ufeff",
    "\ud800",
    "9" * 5000,
    "[" * 100_000,
    "{" * 2000,
    '{"a":' * 3000,
    "null",
    "true",
    "# ",
    "//",
    "\u2028",
    "\x85",
    "x" * 140_000,
    "&a ",
    "*a",
    "&a [*a, *a]",
    "!!python/object/apply:os.system [ls]",
    "!!binary ",
    "!!int ",
    "<<: *a\n",
    "---\n",
    "...\n",
    "- ",
    "? ",
    "| ",
    "> ",
    "%YAML 9.9\n",
    "2024-13-45",
    "0o17",
    "1:2:3",
    "0b_",
    ".inf",
    "~",
]
"""What may be put into a text."""
TEMPLATES = [
    "{text}\nAnswer:",
    "{extra} {text}",
    "{0}",
    "{text.__class__}",
    "{text[0]}",
    "{text!r:>1000000000}",
    "{text:{extra}}",
    "{",
    "}",
    "{}",
    "{label}",
    "{text}" * 200,
    "{text\ud800}",
]


class SlowError(BaseException):
    """An input took too long."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, which has tokens for every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def table(rng: random.Random) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Return valid rows, and the options that describe them."""
    rows: list[dict[str, object]] = [{"text": f"text {i}", "extra": f"more {i}"} for i in range(rng.randint(3, 12))]
    layout = rng.choice(["names", "numbers", "floats", "declared", "lists", "columns"])
    options: dict[str, object] = {}
    for i, one in enumerate(rows):
        label = i % 2
        if layout == "names":
            one["label"] = ("no", "yes")[label]
        elif layout in ("numbers", "floats"):
            one["label"] = float(label) if layout == "floats" else label
        elif layout == "declared":
            one["label"], options["classes"] = ("red", "blue")[label], ["red", "blue"]
        elif layout == "lists":
            one |= {
                "choices": [f"a{i}", f"b{i}"],
                "label": rng.choice([label, "AB"[label], ("a", "b")[label] + str(i)]),
            }
        else:
            one |= {"x": f"a{i}", "y": f"b{i}", "label": label}
            options["choice_columns"] = ["x", "y"]
    if rng.random() < 0.15:
        options |= {"template": rng.choice(TEMPLATES), "readout": "likelihood"}
    return rows, options


def mutate_rows(rng: random.Random, rows: list[dict[str, object]]) -> None:
    """Change a value, a key or a row in place."""
    one = rng.choice(rows) if rows else {}
    key = rng.choice(list(one) or ["label"])
    match rng.randrange(7):
        case 0 | 1 | 2:
            one[key] = rng.choice(CELLS)
        case 3:
            for each in rows:
                each[key] = rng.choice([each.get(key), rng.choice(CELLS)])
        case 4:
            one.pop(key, None)
        case 5:
            one[str(rng.choice(CELLS))[:100]] = rng.choice(CELLS)
        case 6:
            del rows[rng.randrange(len(rows) + 1) :]


def written(rng: random.Random, kind: str, rows: list[dict[str, object]]) -> str:
    """Return rows as the text of a file."""
    ascii_only = rng.random() < 0.5
    if kind == "jsonl":
        end = rng.choice(["\n", "\n", "\r\n", "\r", "\n\n"])
        return "".join(json.dumps(one, ensure_ascii=ascii_only) + end for one in rows)
    if kind == "json":
        whole = rows if rng.random() < 0.9 else {"data": rows}
        return json.dumps(whole, ensure_ascii=ascii_only, indent=rng.choice([None, 1]))
    columns = list(dict.fromkeys(name for one in rows for name in one))
    if rng.random() < 0.05 and columns:
        columns[rng.randrange(len(columns))] = rng.choice([*columns, ""])
    out = io.StringIO()
    usual = "\t" if kind == "tsv" else ","
    writer = csv.writer(
        out,
        delimiter=rng.choice([usual] * 9 + [";", "\t", "|"]),
        lineterminator=rng.choice(["\n", "\r\n", "\r"]),
        quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    )
    cell = [lambda v: json.dumps(v) if isinstance(v, dict | list) else v, lambda v: "" if v is None else v]
    writer.writerows([columns, *([cell[1](cell[0](one.get(name))) for name in columns] for one in rows)])
    return out.getvalue()


def configuration(rng: random.Random) -> str:
    """Return a configuration with a few of its values changed, as YAML."""
    values: dict[str, object] = {
        "method": rng.choice(["swag", "ivon:2", "ensemble:2", "map"]), "set": {}, "task": "openbookqa", "rank": 4,
        "classes": ["yes", "no"], "learning_rate": 1e-4, "trainer": {"max_grad_norm": 0.5, "bf16": False},
        "template": "{text}", "resume": False, "seed": 1, "few_shot": 0, "out": "run",
    }  # fmt: skip
    plain = [c for c in CELLS if not isinstance(c, int) or abs(c) < 10**300]
    if rng.random() < 0.3:
        values = {"methods": ["map", "a=swag"], "set": ["a.rank=3"], "seeds": [0, 1]} | {
            key: value for key, value in values.items() if key not in ("method", "set", "seed")
        }
    for _ in range(rng.randrange(3)):
        place = rng.choice([values, values, values.get("trainer"), values.get("set")])
        place = place if isinstance(place, dict) else values
        names = [*values, "max_steps", "validation", "start", "kl", "seed", "report_to", "output_dir", "optim"]
        place[rng.choice(names)] = rng.choice([*plain, *TEMPLATES])
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=rng.random() < 0.5)}\n" for key, value in values.items())


def mutate_text(rng: random.Random, text: str) -> str:
    """Change a text: cut it, put something in, repeat or swap parts."""
    at = rng.randrange(len(text) + 1)
    to = min(len(text), at + rng.choice([1, 1, 2, 10, 100]))
    lines = text.splitlines(keepends=True)
    match rng.randrange(8):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + text[to:]
        case 2 | 3:
            return text[:at] + rng.choice(WORDS) + text[at:]
        case 4:
            return text[:at] + rng.choice(WORDS) + text[to:]
        case 5:
            return text[:to] + text[at:to] * rng.choice([1, 10, 200]) + text[to:]
        case 6 if lines:
            return "".join([*lines, rng.choice(lines)])
        case _:
            rng.shuffle(lines)
            return "".join(lines)


def mutate_bytes(rng: random.Random, text: str) -> bytes:
    """Return a text as bytes, some of them wrong or in another encoding."""
    match rng.randrange(8):
        case 0:
            return text.encode("utf-16", "surrogatepass")
        case 1:
            return text.encode("latin-1", "replace") + b"\xe9\n"
        case 2:
            return gzip.compress(text.encode(errors="surrogatepass"))
        case 3:
            return b"\xef\xbb\xbf" * rng.choice([1, 2]) + text.encode(errors="surrogatepass")
        case _:
            content = bytearray(text.encode(errors="surrogatepass"))
            for _ in range(rng.choice([1, 3, 20])):
                content[rng.randrange(len(content) + 1) :][:1] = bytes([rng.randrange(256)])
                if content:
                    content[rng.randrange(len(content))] = rng.choice([0, 0x80, 0xFF, rng.randrange(256)])
            return bytes(content)


def odd_file(rng: random.Random, path: Path) -> None:
    """Make what is no file of data: a pipe, a device, a folder, a link, or one that is empty, huge or not there."""
    match rng.randrange(8):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to("/dev/zero")
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to(path)
        case 4:
            path.touch()
        case 5:
            path.touch()
            os.truncate(path, 2**33)
        case 6:
            path.symlink_to("/proc/self/environ")
        case _:
            pass


def make(rng: random.Random, kind: str, folder: Path) -> tuple[Path, bool, dict[str, object]]:
    """Write one input; return its path, whether its rows have own choices, and the options for it."""
    path = folder / f"rows.{kind}"
    rows, options = table(rng)
    choices = "choices" in rows[0] or "x" in rows[0]
    steps = [
        rng.choice(["rows", "rows", "rows", "text", "text", "bytes"]) for _ in range(rng.choice([1, 1, 1, 2, 2, 4]))
    ]
    if rng.random() < 0.01:
        odd_file(rng, path)
        return path, choices, options
    for _ in range(steps.count("rows")):
        mutate_rows(rng, rows)
    text = configuration(rng) if kind == "yaml" else written(rng, kind, rows)
    for _ in range(min(2, steps.count("text"))):
        text = mutate_text(rng, text)
    text = text[: 2 * 10**6]
    content = mutate_bytes(rng, text) if "bytes" in steps else text.encode(errors="surrogatepass")
    path.write_bytes(content)
    return path, choices, options


def named(cell: object, index: int, choices: tuple[str, ...], codes: list[str]) -> bool:
    """Return whether a cell names the choice of an index, in one of the ways that the documentation gives."""
    if isinstance(cell, str):
        cell = cell.strip()
        whole = re.fullmatch(r"(-?\d{1,18})\.0+", cell)
        ways = {cell, whole[1] if whole else cell}
        return bool(ways & {choices[index], str(index), chr(65 + index), *codes[index : index + 1]})
    if isinstance(cell, bool):
        return str(cell) == choices[index] or int(cell) == index
    if isinstance(cell, int | float):
        return choices[index] in (str(cell), str(int(cell))) or cell == index or str(int(cell)) in codes
    return False


def usable(path: Path, task, options: TaskOptions, tokens) -> None:
    """Check that a task is what its file says, and can be put to a model."""
    splits = [split for split in (task.train, task.validation, task.test) if split is not None]
    rows = read_rows(path)
    texts = [" ".join(str(one.get("text", "")).split()) for one in rows]
    for split in splits:
        if split.classes is not None:
            assert len(set(split.classes)) == len(split.classes) >= 2, "classes"
            assert options.classes or not {"nan", "inf"} & {c.lower() for c in split.classes}, "a class without a name"
        for example in split:
            choices, label = example.choices, example.label
            assert label in range(len(choices)), "label"
            assert len({*choices, ""}) == len(choices) + 1, "choices"
            source = [one for one, text in zip(rows, texts, strict=True) if text == " ".join(example.text.split())]
            cells = [one.get("choices") for one in source]
            codes = next((c["label"] for c in cells if isinstance(c, dict) and isinstance(c.get("label"), list)), [])
            coded = list(map(str, codes)) or re.findall(r'"label": \["(.*?)", "(.*?)"\]', str(cells))
            found = any(named(one["label"], label, choices, [str(c) for c in coded]) for one in source) or coded
            assert found or not source, f"label {[one['label'] for one in source]!r} as {choices[label]!r}"
        few = max(len(example.choices) for example in split) <= 26
        encode(split, tokens, "likelihood" if split.classes or options.template or not few else "letters", None)
    check_output(rows)


def check_output(rows: Rows) -> None:
    """Check that rows can be written out with their answers."""
    for one in rows:
        json.dumps(one, ensure_ascii=False, allow_nan=False, default=str).encode()


def judged(work, *words: str) -> str:
    """Return what came of some work on an input: ``used``, ``refused``, or a fault in words."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of its own, whatever else the machine does
    signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)  # for what waits
    try:
        work()
        return "used"
    except InputError as error:
        said = str(error)
        stop = said.endswith(".") and "its columns are" not in said  # the name of one may end so
        placed = not words or any(word in said for word in words)
        clear = placed and not stop and "\n" not in said and 10 < len(said) < 900
        return "refused" if clear else f"unclear: {said[:300]!r}"
    except SlowError:
        return f"slow: {traceback.format_exc()[-300:]!r}"
    except MemoryError:
        return f"memory: {traceback.format_exc()[-300:]!r}"
    except AssertionError as error:
        return f"wrong: {str(error)[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {traceback.format_exc()[-400:]!r}"
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


def outcomes(seed: int, number: int, folder: Path, tokens) -> tuple[str, dict[str, str]]:
    """Make one input and return its kind and what came of each way to read it."""
    rng = random.Random(f"{seed}/{number}")
    kind = KINDS[number % len(KINDS)]
    path, choices, described = make(rng, kind, folder)
    options = TaskOptions(data=str(path), validation=1, **described)
    clear = (path.name, "rows/", "template", "rows has")
    found = {}
    if kind == "yaml":
        text = (
            path.read_text(encoding="utf-8", errors="replace") if path.is_file() and path.stat().st_size < 2**24 else ""
        )

        def configure() -> None:
            made = parse(train.Options, ["--config", str(path)], verb="train", examples="")
            build_method(made.method, made.set)
            if number % 4 == 0:  # slow
                build_arguments(made, folder, made.seed, "cpu")
            json.dumps(vars(made), ensure_ascii=False).encode()

        def compared() -> None:
            made = parse(compare.Options, ["--config", str(path)], verb="compare", examples="")
            build_methods(made.methods, made.set)

        found = {"compare --config": judged(compared)} if "methods" in text else {}
        found = found or {"train --config": judged(configure)}
    else:

        def trained() -> None:
            usable(path, build_task(options, "train"), options, tokens)

        def predicted() -> None:
            classes = None if choices else tuple(options.classes or ("no", "yes"))
            like = Split(
                "rows", (), Format(options.template, "likelihood", kind="class" if classes else "question"), classes
            )
            rows = read_rows(path)
            encode(split_like(rows, like, options), tokens, "likelihood", None)
            check_output(rows)

        found = {"train": judged(trained, *clear), "predict": judged(predicted, *clear)}
    if path.is_symlink() or path.exists():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return kind, found


def run(seed: int, numbers: range) -> tuple[collections.Counter, list[str], float, float]:
    """Return outcomes by kind, the faults, the slowest in seconds of the processor, and the memory gained in MB."""
    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, _slow)
    tokens = tokenizer()
    count, faults, slowest = collections.Counter(), [], 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            began = time.process_time()
            kind, found = outcomes(seed, number, Path(folder), tokens)
            slowest = max(slowest, time.process_time() - began)
            for way, outcome in found.items():
                count[kind, way, outcome.partition(":")[0]] += 1
                if outcome not in ("used", "refused"):
                    faults.append(f"input {number} ({kind}, {way}) {outcome}")
    return count, faults, slowest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _slow(*_: object) -> None:
    raise SlowError


def _limit() -> None:
    """Let a worker have so much more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Run all inputs, print outcomes by kind, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", default=None)
    asked = parser.parse_args()
    count, faults, slowest, gained, done = collections.Counter(), [], 0.0, 0.0, 0
    parts = [range(i, min(i + 1000, asked.inputs)) for i in range(0, asked.inputs, 1000)]
    with ProcessPoolExecutor(asked.workers, get_context("fork"), initializer=_limit) as pool:
        for part in as_completed([pool.submit(run, asked.seed, part) for part in parts]):
            more, wrong, longest, memory = part.result()
            count += more
            faults += wrong
            slowest, gained, done = max(slowest, longest), max(gained, memory), done + 1
            for fault in wrong[:20]:
                print(fault, flush=True)
            print(f"{done}/{len(parts)} thousand, {len(faults)} faults", file=sys.stderr, flush=True)
    rows = [row(" ".join(key), number, 0 if key[2] not in ("used", "refused") else None, "outcomes")
            for key, number in sorted(count.items())]  # fmt: skip
    rows += [row("inputs", asked.inputs, None, "inputs"), row("faults", len(faults), 0, "outcomes")]
    rows += [
        row("slowest input", slowest, SECONDS, "s"),
        row("memory gained by a worker", gained, MEMORY / 2**20, "MB"),
    ]
    finish(rows, asked.json)


if __name__ == "__main__":
    main()
