"""Digests of what scores depend on: the model's weights, the recipe's keys that matter, the data file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vrlt_fast.config import Config

_MODEL = ("config.json", "tokenizer*.json", "chat_template*", "vocab.json", "merges.txt", "*preprocessor_config.json")
_SPEED = {"workers", "deadline", "prefetch"}
_ROLLOUT = ("engine", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop")


def model_digest(folder: Path) -> str:
    """Of configuration, tokenizer and every byte of the weights, wherever the folder stands."""
    files = {path for pattern in (*_MODEL, "*.safetensors") for path in folder.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def recipe_keys(config: Config) -> dict[str, Any]:
    """The keys that decide what is asked, drawn and earned, not how fast."""
    tree = config.model_dump(mode="json")
    video = {k: v for k, v in tree["video"].items() if k not in _SPEED and not k.startswith("cache_")}
    return {
        "model": {"dtype": tree["model"]["dtype"]},
        "data": {key: tree["data"][key] for key in ("tasks", "shuffle_options", "invert")},
        "video": video,
        "prompt": tree["prompt"],
        "rollout": {key: tree["rollout"][key] for key in _ROLLOUT},
        "reward": {k: v for k, v in tree["reward"].items() if k not in ("timeout", "shuffle")},
        "user": {name: _source_digest(name.partition(":")[0]) for name in config.reward.user},
        "judge": {key: tree["judge"][key] for key in ("url", "model")},
        "scorer": tree["scorer"],
        "select": {key: tree["select"][key] for key in ("repeats", "first", "error")},
        "train": {"seed": tree["train"]["seed"]},
    }


def _source_digest(module: str) -> str:
    """Of a module's own file in the current folder; empty for an installed one."""
    path = Path(*module.split("."))
    files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return file_digest(files[0]) if files else ""


def recipe_digest(keys: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
