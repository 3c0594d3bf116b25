"""LoRA: what adapters add, the reference that needs no second model, checkpoints, and runs that go on."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from vrlt_fast.cli import main
from vrlt_fast.config import LoraConfig, ModelConfig
from vrlt_fast.errors import SetupError
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import build_layout, response_row
from vrlt_fast.model.load import load_model
from vrlt_fast.model.lora import AdapterReference, adapter_weights, add_lora
from vrlt_fast.model.replicated import verify_shared_prefix
from vrlt_fast.model.vision import shared_vision
from vrlt_fast.report.console import Console
from vrlt_fast.train.checkpoint import save_checkpoint
from vrlt_fast.train.trainer import train

pytest.importorskip("peft")
LORA = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture
def layout_of(prompts):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        rows = [
            [response_row(p, torch.randint(9, 200, (n,), generator=generator).tolist()) for n in (3, 1, 5)]
            for p in prompts[:2]
        ]
        return prompts[:2], rows

    return make


def logprobs(lm, prompts, rows):
    with torch.no_grad():
        return target_logprobs(lm, build_layout(prompts, rows), shared_vision(lm, prompts))[0]


def randomise(lm, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_weights(lm.module).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def test_adapters_begin_with_nothing_and_end_as_plain_weights(lm, layout_of, tiny_folder, tmp_path, seed):
    """fp64 in between, so that merging agrees to many digits; the folder opens without peft's layers."""
    prompts, rows = layout_of(seed)
    before = logprobs(lm, prompts, rows)
    add_lora(lm, LORA)
    torch.testing.assert_close(logprobs(lm, prompts, rows), before, atol=0, rtol=0)
    trained = {name for name, p in lm.module.named_parameters() if p.requires_grad}
    assert trained == set(adapter_weights(lm.module)) | {n for n in trained if ".visual." in n}
    assert len(adapter_weights(lm.module)) == 2 * 3 * 4
    randomise(lm, seed)
    changed = logprobs(lm, prompts, rows)
    assert float((changed - before).abs().max()) > 0.1
    lm.module.float()
    save_checkpoint(tmp_path / "c", model=lm.module, tokenizer_files=tiny_folder, tensors={}, state={})
    opened = load_model(ModelConfig(name=str(tmp_path / "c"), dtype="float32", device="cpu", freeze_vision=False))
    assert not adapter_weights(opened.module)
    torch.testing.assert_close(logprobs(opened, prompts, rows), changed.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_the_reference_is_the_model_with_other_adapters(lm, layout_of, trained, seed):
    prompts, rows = layout_of(seed)
    add_lora(lm, LORA)
    if trained:
        randomise(lm, seed)
    start = logprobs(lm, prompts, rows)
    kept = {name: p.detach().clone() for name, p in adapter_weights(lm.module).items()}
    reference = AdapterReference(lm, kept if trained else None)
    randomise(lm, seed + 1)
    policy = logprobs(lm, prompts, rows)
    wanted = [name for name, p in lm.module.named_parameters() if p.requires_grad]
    places = [p.data_ptr() for p in adapter_weights(lm.module).values()]
    for _ in range(2):
        with reference.opened() as frozen:
            torch.testing.assert_close(logprobs(frozen, prompts, rows), start, atol=0, rtol=0)
        torch.testing.assert_close(logprobs(lm, prompts, rows), policy, atol=0, rtol=0)
    assert [name for name, p in lm.module.named_parameters() if p.requires_grad] == wanted
    assert [p.data_ptr() for p in adapter_weights(lm.module).values()] == places  # graphs of a GPU hold them


@pytest.mark.parametrize("piece", [0, 1])
def test_the_shared_prefix_is_the_replicated_one_with_adapters(lm, layout_of, piece, seed):
    prompts, rows = layout_of(seed)
    lm.module.float()
    add_lora(lm, LORA)
    randomise(lm, seed)
    found = verify_shared_prefix(lm, prompts, rows, piece=piece)
    assert found.logprob < 1e-5
    assert found.gradient < 2e-5, found.parameter


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("freeze", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_goes_on_bit_for_bit(make_config, tmp_path, freeze):
    """From the end of SFT and from inside GRPO: weights, and KL against the policy after SFT."""
    how = {
        "model": {"freeze_vision": freeze},
        "lora": {"rank": 2},
        "data": {"eval": ""},
        "sft": {"steps": 2, "lr": 1e-2},
        "grpo": {"steps": 3, "lr": 1e-2},
        "reward": {"shuffle": True},
        "optim": {"warmup": 1, "weight_decay": 10.0},
    }
    run = train(make_config(**how), console=Console(file=io.StringIO()))
    whole = read(run)
    kl = [r["kl"] for r in whole if r["stage"] == "grpo"]
    assert kl[0] == pytest.approx(0.0, abs=1e-9)
    assert kl[1] > 0
    weights = load_file(next((run / "checkpoints" / "grpo-final").glob("model-*.safetensors")))
    for last in ("grpo-final", "grpo-000002", "grpo-000001"):
        shutil.rmtree(run / "checkpoints" / last, ignore_errors=True)
        again = train(make_config(**how), resume=True, console=Console(file=io.StringIO()))
        assert [r["kl"] for r in read(again) if r["stage"] == "grpo"] == kl
        for name, tensor in load_file(next((again / "checkpoints" / "grpo-final").glob("model-*"))).items():
            assert torch.equal(tensor, weights[name]), name


def read(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_what_has_no_adapters_is_named(lm, make_config):
    with pytest.raises(SetupError, match=r"lora\.targets"):
        add_lora(lm, LoraConfig(rank=2, targets=("qkv",)))
    with pytest.raises(SetupError, match="whole weights"):
        train(make_config(lora={"rank": 2}, rollout={"engine": "vllm"}), console=Console(file=io.StringIO()))


@pytest.mark.usefixtures("one_thread")
def test_an_export_opens_in_transformers_and_peft(make_config, tiny_folder, tmp_path, prompts, capsys):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    lora = {"rank": 2, "alpha": 3.0}
    how = {"lora": lora, "model": {"freeze_vision": True}, "data": {"eval": ""}, "sft": {"steps": 2, "lr": 1e-1}}
    run = train(make_config(**how, grpo={"steps": 0}, eval={"start": False}), console=Console(file=io.StringIO()))
    assert main(["export", str(run), str(tmp_path / "out"), "--adapter"]) == 0
    assert "grpo-final" in capsys.readouterr().out
    assert not {"trainer", "trainer_state.json", "COMMIT.json"} & {p.name for p in (tmp_path / "out").iterdir()}
    ids = prompts[0].ids[None]
    with torch.no_grad():
        base = Model.from_pretrained(tiny_folder, dtype=torch.float32).eval()
        before = base(input_ids=ids).logits
        whole = Model.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()(input_ids=ids).logits
    assert float((whole - before).abs().max()) > 1e-2
    torch.testing.assert_close(whole, adapted, atol=1e-4, rtol=1e-4)
    assert main(["export", str(run), str(tmp_path / "out")]) == 4
    assert main(["export", str(tmp_path), str(tmp_path / "other")]) == 4
    said = capsys.readouterr().err
    assert "VRLT-R01" in said
    assert "VRLT-K02" in said
    plain = train(
        make_config(data={"eval": ""}, train={"out": str(tmp_path / "plain")}, grpo={"steps": 0}),
        console=Console(file=io.StringIO()),
    )
    assert main(["export", str(plain), str(tmp_path / "third"), "--adapter"]) == 2
    assert "no adapters" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
