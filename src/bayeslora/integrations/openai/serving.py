"""How vLLM serves exported adapters: the line that starts it, and the names that it knows them by.

Checked against vLLM 0.32: its `PEFTHelper` refuses what is refused here, and takes ranks and alphas that differ from
layer to layer (``rank_pattern``, ``alpha_pattern``).
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayeslora.params import Params
from bayeslora.posteriors.folder import ADAPTER, ADAPTER_CONFIG
from bayeslora.posteriors.provenance import Origin

GROUP = "bayeslora_average"
"""The key of a request's ``extra_args`` with the number of its prompt and how many rows that has, one a draw."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as --max-lora-rank."""
VLLM_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""The ``init_lora_weights`` that vLLM takes beside true and false: the others change the base model."""
HEAD_WARNING = (
    "these adapters change the head (lm_head): vLLM leaves that out of echoed log-probabilities, so score by generated "
    "tokens, as bayeslora's client does unless it is told echo=True"
)
"""What `export` says of adapters of the head."""


def served_name(name: str, folder: Path) -> str:
    """Return the name under which a server is to know an adapter in a folder: with a hash of what is in it.

    vLLM keeps prefixes by adapters' names and paths: another adapter of the same name would get those of the first
    (vllm issue 30931).
    """
    content = hashlib.sha256()
    for file in (ADAPTER_CONFIG, ADAPTER):
        content.update((folder / file).read_bytes())
    return f"{name}-{content.hexdigest()[:8]}"


def max_rank(config: Mapping[str, Any]) -> int:
    """Return the highest rank of an adapter's layers."""
    return max(int(config.get("r", 1)), *map(int, (config.get("rank_pattern") or {}).values()), 0)


def refusals(config: Mapping[str, Any]) -> list[str]:
    """Return the reasons for which vLLM does not serve adapters of a configuration."""
    reasons = []
    if config.get("modules_to_save"):
        reasons.append(f"whole modules are saved with them ({', '.join(config['modules_to_save'])})")
    if config.get("use_dora"):
        reasons.append("they are DoRA")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        reasons.append(f"they have biases (bias={config.get('bias', 'none')!r})")
    initialisation = config.get("init_lora_weights", True)
    if isinstance(initialisation, str) and initialisation.lower() not in VLLM_INITIALISATIONS:
        reasons.append(f"they were begun in a changed base model (init_lora_weights={initialisation!r})")
    if config.get("layer_replication"):
        reasons.append("they replicate layers")
    if max_rank(config) > VLLM_RANKS[-1]:
        reasons.append(f"their rank {max_rank(config)} is above {VLLM_RANKS[-1]}")
    return reasons


def changes_head(params: Params) -> bool:
    """Return whether an adapter changes the head's weights."""
    return any(".lm_head." in name for name in params)


def plain_modules(config: Mapping[str, Any]) -> list[str] | None:
    """Return the layers that adapters change, by the last part of their names; None if they are named otherwise.

    Told of no layers, vLLM makes room for adapters in all, the head too, and echoed prompts then end its engine
    on CPUs.
    """
    modules = config.get("target_modules") or ""
    return None if isinstance(modules, str) or any("." in name for name in modules) else sorted(modules)


def vllm_command(origin: Origin, folders: Mapping[str, Path]) -> str:
    """Return the line that starts vLLM with adapters in folders, by name, or the sentence why it would refuse them."""
    config = origin.adapter_config
    if reasons := refusals(config):
        return f"vLLM does not serve these adapters: {' and '.join(reasons)}; other tools load them with PEFT"
    rank = next(allowed for allowed in VLLM_RANKS if allowed >= max_rank(config))
    base = origin.base_model or "BASE"
    words = ["vllm", "serve", str(Path(base).resolve()) if Path(base).is_dir() else base, "--enable-lora"]
    # one slot stays empty: for the base model, vLLM's build for CPUs computes with what is in the last one
    words += ["--max-loras", str(len(folders) + 1), "--max-lora-rank", str(rank)]
    if modules := plain_modules(config):
        words += ["--lora-target-modules", *modules]
    words.append("--lora-modules")
    return shlex.join([*words, *(f"{name}={path.resolve()}" for name, path in folders.items())])
