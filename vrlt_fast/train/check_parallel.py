"""Whether the processes of a run have something to do each, and can share what they are to share."""

from __future__ import annotations

from vrlt_fast.config import Config
from vrlt_fast.errors import ConfigError, Problem
from vrlt_fast.model.load import ModelInfo
from vrlt_fast.model.sequence import check_method
from vrlt_fast.parallel.mesh import check_shard


def check_parallel(config: Config, info: ModelInfo) -> None:
    """Raises ConfigError C04 where a process would have nothing to do, or what is asked for doesn't go together."""
    parallel, text = config.parallel, info.config.text_config
    check_shard(parallel.replicas, parallel.sp, parallel.shard)
    if parallel.sp > 1:
        check_method(parallel.sequence, parallel.sp, text.num_attention_heads, text.num_key_value_heads)
    for key, count in (("parallel.sp", parallel.sp), ("parallel.shard", parallel.shard)):
        if count > 1:
            _check_passes(config, f"{key} = {count}", key)
    if parallel.shard > 1 and config.lora.rank:
        what = f"parallel.shard = {parallel.shard} goes with lora.rank = 0 only"
        raise ConfigError(Problem("VRLT-C04", what, "lora.rank", fix="set parallel.shard = 1, or lora.rank = 0"))
    shared = {"sft": ("sft.batch", config.sft.batch), "grpo": ("rollout.prompts", config.rollout.prompts)}
    for stage in config.train.stages:
        key, count = shared[stage]
        if count < parallel.replicas:
            what = f"{parallel.replicas} replicas share {key} = {count}"
            fix = f"raise {key}, or lower parallel.replicas"
            raise ConfigError(Problem("VRLT-C04", what, "parallel.replicas", "some would have nothing to do", fix))


def _check_passes(config: Config, asked: str, asked_key: str) -> None:
    """Processes that make their passes together make those of the packed layout alone."""
    for key, value, wanted in (
        ("rollout.engine", config.rollout.engine, "group"),
        ("train.prefix", config.train.prefix, "shared"),
        ("train.verify_shared_prefix", config.train.verify_shared_prefix, "off"),
    ):
        if value != wanted:
            what = f'{asked} goes with {key} = "{wanted}" only'
            raise ConfigError(Problem("VRLT-C04", what, key, fix=f'set {key} = "{wanted}", or {asked_key} = 1'))
