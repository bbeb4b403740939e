"""What the JSON files of a posterior's folder may hold: kinds and ranges, looked at before anything is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors.noise import MERSENNE_TWISTER, PHILOX


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words, and whether one is that."""

    words: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Rule:
    """Return the rule of whole numbers in a range."""
    return Rule(f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def number(low: float, high: float) -> Rule:
    """Return the rule of finite numbers in a range."""
    return Rule(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high)


def text(pattern: str = "", most: int = 4096) -> Rule:
    """Return the rule of texts, of a pattern if one is given."""
    words = f"text that matches {pattern}" if pattern else f"text of at most {most} characters"
    whole_text = re.compile(pattern or ".*", re.DOTALL)
    return Rule(words, lambda v: isinstance(v, str) and len(v) <= most and whole_text.fullmatch(v) is not None)


def either(*rules: Rule) -> Rule:
    """Return the rule of values that one of several rules takes."""
    return Rule(" or ".join(rule.words for rule in rules), lambda v: any(rule.holds(v) for rule in rules))


def several(rule: Rule, most: int = 100_000) -> Rule:
    """Return the rule of lists."""
    return Rule(f"a list of {rule.words}", lambda v: isinstance(v, list) and len(v) <= most and all(map(rule.holds, v)))


def mapping(key: Rule, value: Rule) -> Rule:
    """Return the rule of objects."""
    return Rule(
        f"an object of {value.words}",
        lambda v: isinstance(v, dict) and all(key.holds(k) and value.holds(each) for k, each in v.items()),
    )


def _quick(pattern: object) -> bool:
    """Say whether a regular expression is one, and cannot take long on the name of a module."""
    if not isinstance(pattern, str) or len(pattern) > 1000 or re.search(r"\)[*+{]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(re.findall(r"[*+{]", pattern)) <= 3


NOTHING = Rule("null", lambda v: v is None)
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
OBJECT = Rule("an object", lambda v: isinstance(v, dict))
ANY = Rule("anything", lambda _: True)
PATTERN = Rule("a regular expression without repeated groups and with at most three repetitions", _quick)
WEIGHT = number(-1e30, 1e30)
_COUNT = whole(0, 2**40)
_NAMES = several(text())

POSTERIOR: Mapping[str, Rule] = {
    "family": text(),
    "members": whole(0, 1000),
    "scalars": OBJECT,
    "sha256": mapping(text(), text("[0-9a-f]{64}")),
    "fingerprint": OBJECT,
    "base_model": text(),
    "method": text(),
    "settings": OBJECT,
    "num_data": either(NOTHING, _COUNT),
    "noise": text(f"{PHILOX}|{MERSENNE_TWISTER}"),
    "normalisation": either(NOTHING, text("sum|characters|tokens|unconditional")),
}
FINGERPRINT: Mapping[str, Rule] = {"names": text(most=64), "sketch": several(number(-1e38, 1e38), 64)}
ADAPTER: Mapping[str, Rule] = {
    key: either(NOTHING, rule)
    for key, rule in {
        "peft_type": text("LORA"),
        "task_type": text("[A-Z_]*"),
        "base_model_name_or_path": text(),
        "revision": text(),
        "r": whole(1, 2**16),
        "lora_alpha": number(-1e6, 1e6),
        "lora_dropout": number(0, 1),
        "bias": text("none|all|lora_only"),
        "target_modules": either(text(), _NAMES),
        "exclude_modules": either(text(), _NAMES),
        "modules_to_save": several(PATTERN),
        "layers_to_transform": either(_COUNT, several(_COUNT)),
        "layers_pattern": either(PATTERN, several(PATTERN, 64)),
        "rank_pattern": mapping(PATTERN, whole(1, 2**16)),
        "alpha_pattern": mapping(PATTERN, number(-1e6, 1e6)),
        "init_lora_weights": either(FLAG, text(r"[a-z_]*?(_niter_\d{1,3})?", 40)),
        "megatron_config": NOTHING,  # names a module to import
        "layer_replication": several(several(whole(0, 1000), 2), 64),
        "trainable_token_indices": either(several(_COUNT), mapping(text(), several(_COUNT))),
        "target_parameters": _NAMES,
        "alora_invocation_tokens": several(_COUNT),
        "qalora_group_size": whole(1, 2**16),
        **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "use_qalora"), FLAG),
        **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "runtime_config", "auto_mapping"), OBJECT),
    }.items()
}


def check(path: Path, value: Mapping[str, object], rules: Mapping[str, Rule]) -> None:
    """Refuse an object of a file with a value that breaks a rule, by the key of the first."""
    for key, rule in rules.items():
        if key in value and not rule.holds(value[key]):
            raise InputError(
                f"{path}: {key} must be {rule.words}, and it is {str(value[key])[:60]!r}; copy the folder again"
            )


def check_adapter(path: Path, config: Mapping[str, Any], mean: Params) -> None:
    """Refuse a configuration of an adapter that is wrong, or that builds one of another size than its tensors."""
    check(path, config, ADAPTER)
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    if sum(bool(re.search("[*+{]", pattern)) for pattern in patterns) > 64:
        raise InputError(f"{path}: rank_pattern and alpha_pattern have too many regular expressions")
    ranks = [value.shape[0] for name, value in mean.items() if value.ndim and re.search("lora_(embedding_)?A", name)]
    spread = config.get("rank_pattern") or {}
    for rank in (config.get("r") or 1, *spread.values()):
        if rank > max(ranks, default=64) * (8 if spread else 1):
            raise InputError(
                f"{path} has rank {rank}, and the adapter's tensors {max(ranks, default=0)}; copy it again"
            )


def scalar_rule(kind: object) -> Rule:
    """Return the rule of a family's field that is no tensor, by its type."""
    plain = {float: WEIGHT, int: whole(-(2**53), 2**53), bool: FLAG, str: text()}
    if isinstance(kind, type) and kind in plain:
        return plain[kind]
    return either(*plain.values(), NOTHING, mapping(text(), either(WEIGHT, FLAG, text())))
