"""How vLLM serves exported adapters."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from bayeslora.posteriors.provenance import Origin

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as --max-lora-rank."""


def vllm_command(origin: Origin, folders: Mapping[str, Path]) -> str:
    """Return the line that starts vLLM with adapters in folders, by name, or the sentence why it would refuse them."""
    config = origin.adapter_config
    reasons = []
    if config.get("modules_to_save"):
        reasons.append(f"whole modules are saved with them ({', '.join(config['modules_to_save'])})")
    if config.get("use_dora"):
        reasons.append("they are DoRA")
    if config.get("bias", "none") != "none":
        reasons.append(f"they have biases (bias={config['bias']!r})")
    if int(config.get("r", 1)) > VLLM_RANKS[-1]:
        reasons.append(f"their rank {config['r']} is above {VLLM_RANKS[-1]}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        reasons.append(
            "their rank or alpha differs from layer to layer (rank_pattern, alpha_pattern), which it ignores"
        )
    if reasons:
        return f"vLLM does not serve these adapters: {' and '.join(reasons)}; other tools load them with PEFT"
    rank = next(allowed for allowed in VLLM_RANKS if allowed >= int(config.get("r", 1)))
    base = origin.base_model or "BASE"
    words = ["vllm", "serve", str(Path(base).resolve()) if Path(base).is_dir() else base, "--enable-lora"]
    words += ["--max-loras", str(len(folders)), "--max-lora-rank", str(rank), "--lora-modules"]
    return shlex.join([*words, *(f"{name}={path.resolve()}" for name, path in folders.items())])
