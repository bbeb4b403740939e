"""Posterior folders from strangers: mutated in every way, each ends as one sentence or as a valid posterior.

``python benchmarks/soak/folders.py --inputs 100000 --seed 0 --json FILE``

Folders of every family, in both formats, and plain adapters are changed by one to three mutations; most are then
sealed with right checksums, so that what is behind them is reached. Each is loaded in a child process with a limit of
time and of memory; a child that dies is one outcome more, and another goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from report import finish, row
from support import families
from support.folders import ADAPTER_CONFIG, CONFIG, TENSORS, first_format, seal, second_format

from bayeslora.errors import InputError
from bayeslora.models import adapter_of
from bayeslora.posteriors import Mixture, Posterior, TokenDropout
from bayeslora.posteriors.loading import load_adapter, load_posterior
from bayeslora.posteriors.provenance import Origin

SECONDS = 2.0
MEMORY = 512 * 2**20
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none",
    "target_modules": ["q"], "exclude_modules": None, "modules_to_save": ["score"], "layers_to_transform": None,
    "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "use_dora": False,
    "use_rslora": False, "megatron_config": None, "layer_replication": None, "loftq_config": {}, "inference_mode": True,
}  # fmt: skip
ORIGIN = Origin(
    ADAPTER, "org/base", {"names": "0123456789abcdef", "sketch": [0.5, -1.0]}, "test", {"rank": 3}, 24, "sum"
)
SLOW = [
    "(a+)+$",
    "(.*)*x",
    "(.|.)*" * 4 + "z",
    ".*" * 20 + "z",
    "(([a-z._0-9]+)+)+!",
    "((",
    "a{1,99999}{9}",
    "(?P<n>.*)" * 3,
]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 10**400, 1e9, 1e308, -1e308, 1e-320, 0.5, math.inf,
    -math.inf, math.nan, "", "x", "\ud800", "\x00", "a" * 100_000, "../../x", "/dev/zero", "member-0", "LORA", "IA3",
    "Mixture", "Point", "LowRankGaussian", "Linearised", "Scaled", "KroneckerGaussian", "TokenDropout", [], [[]], {},
    {"a": 1}, [1, "a", None], [None] * 1000, {"": {}}, [math.nan], ["x"] * 65, [1e39], *SLOW, {SLOW[0]: 4},
    {"q": 10**6}, [[0, 10**6]], SLOW,
]  # fmt: skip
NAMES = ["/dev/zero", "../p/adapter_model.safetensors", "/etc/passwd", "fifo", "README.md", ".", "", "x" * 300, "\x00"]
MORE_KEYS = ["target_parameters", "megatron_core", "eva_config", "trainable_token_indices", "use_qalora"]
Mutation = Callable[[random.Random, Path], None]


def bases(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return the content of folders of every family in every format, and of a plain adapter."""

    def placed(posterior: Any) -> Any:
        parts: dict[str, Any] = {"origin": ORIGIN}
        if isinstance(posterior, Mixture):
            parts["members"] = tuple(map(placed, posterior.members))
        if hasattr(posterior, "posterior"):
            parts["posterior"] = placed(posterior.posterior)
        return replace(posterior, **parts)

    made: dict[str, Callable[[], Posterior]] = {
        **families.FAMILIES,
        "token dropout": lambda: TokenDropout(families.mean(), 0.25),
        "nested": lambda: Mixture((placed(families.FAMILIES["scaled"]()), placed(families.FAMILIES["mixture"]()))),
    }
    found = {}
    for name, make in made.items():
        placed(make()).save_pretrained(folder / name)
        found[name] = content(folder / name)
        second_format(folder / name)
        found[f"{name}, format 2"] = content(folder / name)
        first_format(folder / name)
        found[f"{name}, format 1"] = content(folder / name)
    found["plain adapter"] = {name: found["point"][name] for name in (ADAPTER_CONFIG, TENSORS[0])}
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, but the card."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def files(folder: Path, *suffixes: str) -> list[Path]:
    """Return the regular files of a folder that end so; links are not followed."""
    every = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    return sorted(path for path in every if path.suffix in (suffixes or (path.suffix,)) and regular(path))


def regular(path: Path) -> bool:
    """Say whether a path is a small file itself."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size < 2**24


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container of a JSON value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def edited(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change the value of a JSON file."""
    try:
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    except (ValueError, OSError, RecursionError):
        return


def bits(rng: random.Random, folder: Path) -> None:
    """Flip a few bits of a file."""
    path = rng.choice(files(folder))
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def bytes_(rng: random.Random, folder: Path) -> None:
    """Cut, repeat, insert or blank a part of a file."""
    path = rng.choice(files(folder))
    data = path.read_bytes()
    a, b = sorted(rng.randint(0, len(data)) for _ in range(2))
    middle = rng.choice([b"", data[a:b] * 2, rng.randbytes(b - a), b"\0" * (b - a), data[a:b] + rng.randbytes(9)])
    path.write_bytes(rng.choice([data[:a] + middle + data[b:], data[:a]]))


def json_value(rng: random.Random, folder: Path) -> None:
    """Put another value anywhere into a JSON file."""

    def edit(value: Any) -> Any:
        found = list(places(value))
        if found:
            at, key = rng.choice(found)
            at[key] = rng.choice(VALUES)
        return value

    edited(rng.choice(files(folder, ".json")), edit)


def json_key(rng: random.Random, folder: Path) -> None:
    """Take out, rename or add a key of a JSON file."""

    def edit(value: Any) -> Any:
        found = [(at, key) for at, key in places(value) if isinstance(at, dict)]
        if found:
            at, key = rng.choice(found)
            kept = at.pop(key) if rng.random() < 0.7 else at[key]
            if rng.random() < 0.7:
                at[
                    rng.choice([*map(str, at), "mean", "members", "origin", "posterior", "scale", "rate", "x" * 5000])
                ] = kept
        return value

    edited(rng.choice(files(folder, ".json")), edit)


def json_text(rng: random.Random, folder: Path) -> None:
    """Write what is hardly JSON: nesting, repeated keys, NaN, long numbers, other encodings."""
    path = rng.choice(files(folder, ".json"))
    text = path.read_text(errors="replace")
    depth = rng.choice([40, 900, 5000, 100_000])
    deep = rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
    change = rng.choice(
        [
            deep,
            text.replace("{", '{"family": "Point", "family": "Mixture", "r": 1, "r": 9,', 1),
            text.replace("{", '{"scalars": ' + deep + ",", 1),
            text.replace("2", rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "0x10", "1" * 400]), 1),
            "\ufeff" + text,
            text + text,
            "null",
            '"' + "a" * 10**6 + '"',
        ]
    )
    path.write_bytes(change.encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-16"])))


def header(rng: random.Random, folder: Path) -> None:
    """Change the header of a safetensors file: types, shapes, places, names and its length."""
    path = rng.choice(files(folder, ".safetensors") or files(folder))
    data = path.read_bytes()
    try:
        size = struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8 : 8 + size])
        entry = table[rng.choice([key for key in table if key != "__metadata__"])]
        kinds = ["I64", "I32", "F16", "BF16", "F64", "BOOL", "U8", "C64", "F8_E4M3", "F4", "x", 3]
        match rng.randrange(5):
            case 0:
                entry["dtype"] = rng.choice(kinds)
            case 1:
                entry["shape"] = rng.choice(
                    [[], [0], [2**40], [-1], [1] * 70, entry["shape"][::-1], [entry["shape"]], "x"]
                )
            case 2:
                entry["data_offsets"] = rng.choice([[0, 0], [0, 2**62], [9, 3], [-4, 4], [0], "x"])
            case 3:
                table[rng.choice(["", "/", "mean/x", "x" * 5000, "variance/", "__metadata__"])] = entry
            case _:
                size = rng.choice([0, 1, 2**32, 2**63, size + 1, size - 1])
        text = json.dumps(table).encode()
        written = size if size != struct.unpack("<Q", data[:8])[0] else len(text)
        path.write_bytes(struct.pack("<Q", written) + text + data[8 + struct.unpack("<Q", data[:8])[0] :])
    except (ValueError, KeyError, IndexError, TypeError, struct.error):
        return


def tensors(rng: random.Random, folder: Path) -> None:
    """Write other tensors: types, shapes, values, names, too many and too few."""
    path = rng.choice(files(folder, ".safetensors") or files(folder))
    try:
        found = load(path.read_bytes())
        name = rng.choice(sorted(found))
    except Exception:
        return
    value = found[name].float()
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8]
    spoilt = value.clone().flatten()
    if len(spoilt):
        numbers = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e38, -3e38, 1e29, 1e-40]
        spoilt[rng.randrange(len(spoilt))] = rng.choice(numbers)
    found[name] = rng.choice(
        [
            value.to(rng.choice(kinds)),
            spoilt.view(value.shape),
            spoilt.view(value.shape),
            torch.full_like(value, rng.choice([0.0, 1e25, 1e38, -1.0])),
            value.reshape(-1),
            value[None],
            value[:1].clone() if value.ndim else value,
            torch.zeros(()),
            torch.zeros(0),
            value.repeat(3, *[1] * (value.ndim - 1)) if value.ndim else value,
        ]
    )
    match rng.randrange(6):
        case 0:
            del found[name]
        case 1:
            found[rng.choice(["mean/x", "x", name + "x", name.replace("variance", "scale"), ""])] = found.pop(name)
        case 2:
            found |= {f"{name}{k}": value.clone() for k in range(rng.choice([1, 300]))}
    path.write_bytes(save({key: each.contiguous() for key, each in found.items()}))


def placed_file(rng: random.Random, folder: Path) -> None:
    """Put in a file's place nothing, a folder, a pipe, a link, another file or a huge one."""
    path = rng.choice(files(folder))
    other = rng.choice(files(folder))
    kept = other.read_bytes()
    path.unlink()
    match rng.randrange(10):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(
                rng.choice(["/dev/zero", "/dev/stdin", "/etc/passwd", path.name, "nowhere", "..", "/proc/self/mem"])
            )
        case 3:
            path.write_bytes(b"")
        case 4:
            path.write_bytes(b"{}" if rng.random() < 0.5 else struct.pack("<Q", rng.choice([8, 2**20, 2**40])) + b"{")
            os.truncate(path, rng.choice([2**33, 2**40]))
        case 5:
            outside = folder.parent / "outside"
            outside.write_bytes(kept)
            path.symlink_to(outside)
        case 6 | 7:
            path.write_bytes(kept)


def sums(rng: random.Random, folder: Path) -> None:
    """Have the checksums name other files, or be no checksums."""
    if not (folder / CONFIG).is_file():
        return
    (folder / "fifo").exists() or os.mkfifo(folder / "fifo")

    def edit(value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("sha256"), dict):
            sha = value["sha256"]
            sha[rng.choice([*NAMES, *sha])] = rng.choice(["0" * 64, *VALUES, *sha.values()])
        return value

    edited(folder / CONFIG, edit)


def members(rng: random.Random, folder: Path) -> None:
    """Take out, swap or link members, and say that there are others."""
    found = sorted(path for path in folder.rglob("member-*") if path.is_dir() and not path.is_symlink())
    if found:
        path, other = rng.choice(found), rng.choice(found)
        match rng.randrange(5):
            case 0:
                shutil.rmtree(path)
            case 1:
                shutil.rmtree(path)
                path.symlink_to(rng.choice([".", "..", "member-0", "member-1", str(folder), "/"]))
            case 2:
                if path != other and path not in other.parents and other not in path.parents:
                    path.rename(folder / "kept")
                    other.rename(path)
                    (folder / "kept").rename(other)
            case 3:
                target, depth = path, rng.choice([1, 3, 12])
                for _ in range(depth):
                    kept = content(target)
                    target = target / "member-0"
                    write(target, kept)
    configs = [path for path in files(folder, ".json") if path.name == CONFIG]
    if configs:
        count = rng.choice([0, 1, 2, 3, -1, 10**9, math.inf, 1.5, "2", None, True])
        edited(rng.choice(configs), lambda value: value | {"members": count} if isinstance(value, dict) else value)


def adapter(rng: random.Random, folder: Path) -> None:
    """Change the configuration of an adapter: ranks, layers, regular expressions."""
    configs = [path for path in files(folder, ".json") if path.name == ADAPTER_CONFIG]
    key = rng.choice(
        [*ADAPTER, "target_parameters", "megatron_core", "eva_config", "trainable_token_indices", "use_qalora"]
    )
    if configs:
        value = rng.choice([*VALUES, 10**6, 3, {rng.choice(SLOW): 2}, [rng.choice(SLOW)], {"m": "os"}])
        edited(rng.choice(configs), lambda found: found | {key: value} if isinstance(found, dict) else found)


MUTATIONS: dict[str, Mutation] = {
    "bits": bits, "bytes": bytes_, "JSON value": json_value, "JSON key": json_key, "JSON text": json_text,
    "header": header, "tensors": tensors, "file": placed_file, "checksums": sums, "members": members,
    "adapter": adapter,
}  # fmt: skip


def write(folder: Path, found: Mapping[str, bytes]) -> None:
    """Write files into a folder."""
    for name, data in found.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def mutated(rng: random.Random, folder: Path, every: Mapping[str, Mapping[str, bytes]]) -> tuple[str, str, bool]:
    """Write a mutated folder; return the base's name, that of the first mutation, and whether it is sealed."""
    base, names = rng.choice(sorted(every)), rng.choices(sorted(MUTATIONS), k=rng.choice([1, 1, 2, 3]))
    write(folder, every[base])
    for name in names:
        with suppress(Exception):  # nothing is left to mutate
            MUTATIONS[name](rng, folder)
    sealed = rng.random() < 0.75
    if sealed:
        with suppress(Exception):  # nothing is left to seal
            seal(folder)
    return base, names[0], sealed


def numbers(posterior: Posterior) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the mean and draws of a posterior."""
    yield posterior.mean
    if not isinstance(posterior, TokenDropout) and not (
        isinstance(posterior, Mixture) and any(isinstance(member, TokenDropout) for member in posterior.members)
    ):
        yield from (posterior.draw(k) for k in range(3))


def judged(folder: Path, original: Posterior | None) -> str:
    """Load a folder and return the outcome: a sentence, a valid posterior, or what is wrong."""
    try:
        if not (folder / CONFIG).exists():
            original = None  # what is left is a plain adapter, which has no checksums
        posterior = (load_posterior if (folder / CONFIG).exists() else load_adapter)(folder)
        assert posterior.origin is not None
        adapter_of(posterior.origin.adapter_config, posterior.mean)
    except InputError as error:
        text = str(error)
        return "a sentence" if "\n" not in text and len(text) < 1000 else f"no sentence: {text[:60]!r}"
    found = list(numbers(posterior))
    for params in found:
        for name, value in params.items():
            if value.dtype != torch.float32 or value.shape != posterior.mean[name].shape:
                return "accepted with a wrong type or shape"
            if not bool(torch.isfinite(value).all()):
                return "accepted though not finite"
    if original is not None:
        same = all(
            one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
            for one, two in zip(found, numbers(original), strict=False)
        )
        if not same or posterior.origin != original.origin:
            return "changed unseen"
    return "a valid posterior"


def expired(*_: object) -> None:
    """End what takes too long."""
    raise TimeoutError


def one(
    index: int, seed: int, work: Path, every: Mapping[str, Mapping[str, bytes]], originals: Mapping[str, Posterior]
) -> list[str]:
    """Make and judge one input; return mutation, base and outcome."""
    rng, folder = random.Random(f"{seed}/{index}"), work / "p"
    shutil.rmtree(work, ignore_errors=True)
    folder.mkdir(parents=True)
    base, mutation, sealed = mutated(rng, folder, every)
    known = originals.get(base) if not sealed and "format 1" not in base and base != "plain adapter" else None
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        outcome = judged(folder, known)
    except TimeoutError:
        outcome = "a hang"
    except MemoryError:
        outcome = "too much memory"
    except BaseException as error:
        outcome = f"raised {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return [mutation, base, outcome]


def worker(writer: int, numbers_: range, seed: int, work: Path, every: Any, originals: Any) -> None:
    """Judge inputs in a process with bounded memory, and tell the outcome of each."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, expired)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for index in numbers_:
        os.write(writer, (json.dumps([index, *one(index, seed, work, every, originals)]) + "\n").encode())


def survey(inputs: int, seed: int, *, start: int = 0, say: Callable[[str], None] = lambda _: None) -> list[list[Any]]:
    """Judge so many inputs; return index, mutation, base and outcome of each."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    results: list[list[Any]] = []
    with tempfile.TemporaryDirectory(dir=place) as root:
        every = bases(Path(root) / "bases")
        originals = {}
        for name, found in every.items():
            if "format 1" not in name and name != "plain adapter":
                write(Path(root) / "whole" / name, found)
                originals[name] = load_posterior(Path(root) / "whole" / name)
        at, end = start, start + inputs
        while at < end:
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.close(reader)
                    worker(writer, range(at, end), seed, Path(root) / "work", every, originals)
                finally:
                    os._exit(0)
            os.close(writer)
            with os.fdopen(reader, "rb") as pipe:
                while at < end:
                    ready = select.select([pipe], [], [], 10 * SECONDS)[0]
                    line = pipe.readline() if ready else b""
                    if not line:
                        results.append([at, "?", "?", "killed its process" if ready else "a hang"])
                        os.kill(child, signal.SIGKILL)
                        at += 1
                        break
                    results.append(json.loads(line))
                    at += 1
                    if len(results) % 2000 == 0:
                        say(f"{len(results):,} of {inputs:,}: {dict(Counter(r[3] for r in results))}")
            os.waitpid(child, 0)
    return results


def bad(outcome: str) -> bool:
    """Say whether an outcome is neither a sentence nor a valid posterior."""
    return outcome not in ("a sentence", "a valid posterior")


def main() -> None:
    """Judge the inputs and print the outcomes, by mutation too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first input, to look at one again")
    parser.add_argument("--json", help="file for the rows")
    options = parser.parse_args()
    results = survey(options.inputs, options.seed, start=options.start, say=lambda text: print(text, flush=True))
    outcomes = Counter(outcome for *_, outcome in results)
    wrong = [each for each in results if bad(each[3])]
    for each in wrong[:50]:
        print("WRONG", each)
    rows = [
        row(outcome, float(count), 0.0 if bad(outcome) else None, "inputs") for outcome, count in outcomes.most_common()
    ]
    rows.append(row("neither a sentence nor a valid posterior", float(len(wrong)), 0.0, f"of {len(results)} inputs"))
    for mutation, count in sorted(Counter((m, o) for _, m, _, o in results).items()):
        rows.append(row(f"{mutation[0]}: {mutation[1]}", float(count), None, "inputs"))
    finish(rows, options.json)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
