"""TRL's own GRPOTrainer, with and without ours in place: three steps of a tiny text model on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from vrlt_kernels import KernelInputError  # noqa: E402
from vrlt_kernels.compat.trl import apply  # noqa: E402

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(tied: bool) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(11)
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 for token in ids) / (1 + len(ids)) for ids in completion_ids]


def trainer(folder: Path, tied: bool, **options: Any) -> Any:
    prompts = datasets.Dataset.from_dict({"prompt": [f"w{i} w{2 * i + 1} w{3 * i}" for i in range(12)]})
    config = trl.GRPOConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, num_generations=4, steps_per_generation=2,
        gradient_accumulation_steps=1, num_iterations=2, max_completion_length=12, temperature=0.9, learning_rate=1e-2,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, seed=5, model_init_kwargs={"dtype": "float32"}, **options,
    )  # fmt: skip
    model(tied).save_pretrained(folder / "model")
    return trl.GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=config,
        train_dataset=prompts,
        processing_class=tokenizer(),
    )


def run(folder: Path, tied: bool, **options: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    made = trainer(folder, tied, **options)
    made.train()
    return made.state.log_history[:3], made.model.state_dict()


@pytest.mark.parametrize(
    ("tied", "options"),
    [(False, {"beta": 0.04, "loss_type": "dapo"}), (True, {"entropy_coef": 0.01, "loss_type": "grpo"})],
)
def test_three_steps_agree(tmp_path: Path, tied: bool, options: dict[str, Any]) -> None:
    log, weights = run(tmp_path / "own", tied, **options)
    with apply(trl) as handle:
        our_log, our_weights = run(tmp_path / "ours", tied, **options)
    calls = {r.name: r.calls for r in handle.report()}
    assert calls["trl.kernels.chunked_logprob.ChunkedLogProbFunction"] >= 3
    assert len(log) == len(our_log) == 3
    assert log[2]["clip_ratio/region_mean"] > 0
    for own, our in zip(log, our_log, strict=True):
        assert own["grad_norm"] > 0
        for name in {"loss", "grad_norm", "entropy", "clip_ratio/region_mean", "kl"} & own.keys():
            assert our[name] == pytest.approx(own[name], rel=1e-4, abs=1e-6), name
    start = model(tied).state_dict()
    assert weights.keys() == our_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(our_weights[name], value, rtol=1e-4, atol=2e-5, msg=name)
    assert any(not torch.equal(start[name], value) for name, value in weights.items())


def test_apply_to_a_trainer_and_undo(tmp_path: Path) -> None:
    import trl.trainer.utils as utils
    from trl.kernels import ChunkedLogProbFunction

    made = trainer(tmp_path, False)
    with apply(made) as handle:
        assert utils._ChunkedLogProbFunction is not ChunkedLogProbFunction
        places = {place for r in handle.report() for place in r.places}
        assert {"trl.kernels.ChunkedLogProbFunction", "trl.trainer.utils._ChunkedLogProbFunction"} <= places
        with pytest.raises(KernelInputError, match="already replaced"):
            apply(made)
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert not any(r.places for r in handle.report())
