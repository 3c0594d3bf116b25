"""Checkpoints: bitwise round trip, HF layout, complete or absent, damage and full disks reported."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vrlt_fast.errors import SetupError
from vrlt_fast.train import checkpoint as ck
from vrlt_fast.train import tensor_files

SPECIAL = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}


def tiny_model(seed: int, *, tied: bool = True, dtype: torch.dtype = torch.float32):
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
    }
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **SPECIAL)
    return Qwen2_5_VLForConditionalGeneration(config).to(dtype)


def source_folder(parent: Path) -> Path:
    """A source model folder as far as its side files go."""
    folder = parent / "source"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "merges.txt"):
        (folder / name).write_text(f'{{"file": "{name}"}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "training_args.bin", "code.py"):
        (folder / name).write_text("must not be copied")
    return folder


def train_a_step(model, optimizer) -> None:
    model(input_ids=torch.randint(5, 128, (2, 7)), use_cache=False).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Path, model, *, tensors=None, state=None) -> None:
    source = folder.parents[1] / "source"
    if not source.exists():
        source_folder(folder.parents[1])
    tensors = {"x": torch.arange(3)} if tensors is None else tensors
    ck.save_checkpoint(folder, model=model, tokenizer_files=source, tensors=tensors, state=state or {"step": 1})


def same_weights(a, b) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(t, theirs[n]) and t.dtype == theirs[n].dtype for n, t in a.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_opens_it_bitwise(tmp_path, tied, dtype, seed):
    model = tiny_model(seed, tied=tied, dtype=dtype)
    folder = tmp_path / "checkpoints" / "sft-final"
    save(folder, model)
    opened, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert same_weights(model, opened)
    assert (opened.lm_head.weight is opened.model.language_model.embed_tokens.weight) is tied
    model.save_pretrained(tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as theirs:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(theirs.keys())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_weights_load_in_place_also_into_an_opened_model(tmp_path, seed):
    model, folder = tiny_model(seed), tmp_path / "checkpoints" / "sft-000001"
    save(folder, model)
    fresh = tiny_model(seed + 1)
    before = fresh.lm_head.weight.data_ptr()
    ck.load_weights_into(folder, fresh)
    assert fresh.lm_head.weight.data_ptr() == before
    assert same_weights(model, fresh)
    opened = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        for parameter in opened.parameters():
            parameter.normal_()
    save(tmp_path / "checkpoints" / "sft-000002", opened)
    ck.load_weights_into(tmp_path / "checkpoints" / "sft-000002", fresh)
    assert same_weights(opened, fresh)
    ck.load_weights_into(folder, opened)
    assert same_weights(model, opened)


def test_large_models_are_split_over_files(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 100_000)
    model, folder = tiny_model(seed), tmp_path / "checkpoints" / "sft-final"
    save(folder, model, tensors={str(i): torch.randn(20_000) for i in range(4)})
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert len(list((folder / "trainer").glob("*.safetensors"))) == 4
    assert same_weights(model, Qwen2_5_VLForConditionalGeneration.from_pretrained(folder))
    fresh = tiny_model(seed + 1)
    ck.load_weights_into(folder, fresh)
    assert same_weights(model, fresh)


def test_trainer_tensors_and_state_come_back_bitwise(tmp_path, seed):
    torch.manual_seed(seed)
    big = torch.randn(6, 8)
    tensors = {
        "scalar": torch.randn(()),
        "bytes": torch.randint(0, 256, (37,), dtype=torch.uint8),
        "long": torch.tensor([2**53 + 1, -1]),
        "flags": torch.tensor([True, False]),
        "double": torch.randn(2, 3, dtype=torch.float64),
        "bf16/of a layer.weight": torch.randn(3, 4, dtype=torch.bfloat16),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "transposed": big.t(),
        "slice": big[1:3],
        "empty": torch.zeros(0, 4),
    }
    state = {"stage": "grpo", "step": 12, "format": 1, "order": [3, 1, 2], "position": {"epoch": 0}}
    folder = tmp_path / "checkpoints" / "grpo-000012"
    save(folder, tiny_model(0), tensors=tensors, state=state)
    loaded = ck.load_checkpoint(folder)
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = loaded.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
    save(tmp_path / "checkpoints" / "grpo-000013", tiny_model(0), tensors={})
    assert ck.load_checkpoint(tmp_path / "checkpoints" / "grpo-000013").tensors == {}


def test_folder_holds_no_pickle_no_code_and_no_foreign_weights(tmp_path):
    folder = tmp_path / "checkpoints" / "sft-final"
    save(folder, tiny_model(0))
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    shards = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    side = {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "merges.txt", "chat_template.jinja"}
    assert files.keys() == shards | {f"trainer/{name}" for name in shards} | side | {
        "additional_chat_templates/tool.jinja",
        "config.json",
        "generation_config.json",
        "trainer_state.json",
        "COMMIT.json",
    }
    for name, data in files.items():
        # Zip (torch.save) and pickle protocols 2 to 5; a safetensors file has its header's length, then JSON.
        assert data[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or data[8:9] == b"{", name
        if name.endswith(".safetensors"):
            size = int.from_bytes(data[:8], "little")
            assert json.loads(data[8 : 8 + size])["__metadata__"]["format"] == "pt"
    assert files.keys() - {"COMMIT.json"} == json.loads(files["COMMIT.json"])["files"].keys()


def test_optimizer_continues_bitwise(tmp_path, seed):
    model = tiny_model(seed)
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([p for n, p in names.items() if "visual" not in n], lr=1e-3)
    train_a_step(model, optimizer)
    tensors = ck.optimizer_tensors(optimizer, names) | ck.rng_tensors()
    folder = tmp_path / "checkpoints" / "sft-000001"
    save(folder, model, tensors=tensors)
    train_a_step(model, optimizer)

    other = tiny_model(seed + 1)
    theirs = dict(list(other.named_parameters())[::-1])
    resumed = torch.optim.AdamW([p for n, p in theirs.items() if "visual" not in n], lr=1e-3)
    loaded = ck.load_checkpoint(folder)
    ck.load_weights_into(folder, other, verified=True)
    ck.load_optimizer_tensors(resumed, theirs, loaded.tensors)
    ck.load_rng_tensors(loaded.tensors)
    train_a_step(other, resumed)
    assert same_weights(model, other)
    left, right = ck.optimizer_tensors(optimizer, names), ck.optimizer_tensors(resumed, theirs)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_optimizer_without_state_and_with_foreign_state():
    model = torch.nn.Linear(3, 2)
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    untouched = ck.optimizer_tensors(optimizer, names)
    assert untouched.keys() == {"optimizer/weight/step", "optimizer/bias/step"}
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    stepped = ck.optimizer_tensors(optimizer, names)
    fresh = torch.optim.AdamW(model.parameters())
    ck.load_optimizer_tensors(fresh, names, stepped)
    assert model.bias not in fresh.state
    assert torch.equal(fresh.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    ck.load_optimizer_tensors(fresh, names, untouched)
    assert not fresh.state

    wrong = {
        "missing": {k: v for k, v in stepped.items() if "weight" not in k},
        "isn't optimized": stepped | {"optimizer/extra/step": torch.zeros(())},
        "exp_avg is": stepped | {"optimizer/weight/exp_avg": torch.zeros(3, 2)},
        "instead of step": {k: v for k, v in stepped.items() if not k.endswith("exp_avg")},
    }
    for words, tensors in wrong.items():
        with pytest.raises(SetupError, match=words) as caught:
            ck.load_optimizer_tensors(fresh, names, tensors)
        assert caught.value.code == "VRLT-K01"
        assert not fresh.state


def test_random_states_come_back(seed):
    random.seed(seed)
    torch.manual_seed(seed)
    random.gauss(0, 1)
    saved = ck.rng_tensors()
    assert all(tensor.dtype == torch.uint8 for tensor in saved.values())
    drawn = [random.gauss(0, 1), random.random(), *torch.randn(5).tolist()]
    ck.load_rng_tensors(saved)
    assert drawn == [random.gauss(0, 1), random.random(), *torch.randn(5).tolist()]
    with pytest.raises(SetupError, match="rng/torch"):
        ck.load_rng_tensors({"rng/python": saved["rng/python"]})


def test_every_kind_of_damage_is_named_with_the_way_on(tmp_path, seed):
    rng = random.Random(seed)
    good, bad = tmp_path / "checkpoints" / "sft-000001", tmp_path / "checkpoints" / "sft-000002"
    model = tiny_model(rng.randrange(2**31))
    save(good, model)
    save(tmp_path / "original", model)
    names = sorted(p.relative_to(good).as_posix() for p in good.rglob("*") if p.is_file() and p.name != "COMMIT.json")
    for name in names:
        for damage in ("missing", "bytes instead of", "SHA-256"):
            shutil.copytree(good, bad)
            path = bad / name
            data = bytearray(path.read_bytes())
            if damage == "missing":
                path.unlink()
            elif damage == "bytes instead of":
                path.write_bytes(data[: rng.randrange(len(data))])
            else:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                path.write_bytes(data)
            with pytest.raises(SetupError, match=damage) as caught:
                ck.load_checkpoint(bad)
            problem = caught.value.problems[0]
            assert (problem.code, problem.where) == ("VRLT-K01", str(path))
            assert f"rm -r {bad}" in problem.fix
            assert "sft-000001" in problem.fix
            with pytest.raises(SetupError):
                ck.load_weights_into(bad, model)
            shutil.rmtree(bad)
    shutil.copytree(good, bad)
    (bad / names[0]).unlink()
    (bad / "model.safetensors").write_bytes(b"stray")
    shutil.rmtree(good)
    with pytest.raises(SetupError) as caught:
        ck.load_checkpoint(bad)
    assert [p.where for p in caught.value.problems] == [str(bad / names[0]), str(bad / "model.safetensors")]
    assert "no other checkpoint" in caught.value.problems[0].fix


def test_flipped_manifest_never_passes_for_another_checkpoint(tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "checkpoints" / "sft-final"
    save(folder, tiny_model(0), state={"step": 3})
    manifest = folder / "COMMIT.json"
    whole = manifest.read_bytes()
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        manifest.write_bytes(data)
        try:
            outcome = ck.load_checkpoint(folder).state
        except SetupError as error:
            outcome, refused = error.code, refused + 1
        assert outcome in ("VRLT-K01", {"step": 3})
    assert refused > 30
    manifest.unlink()
    for place in (folder, tmp_path / "checkpoints" / "sft-000009"):
        with pytest.raises(SetupError) as caught:
            ck.load_checkpoint(place)
        assert caught.value.code == "VRLT-K01"


def test_weights_of_another_model_are_refused(tmp_path):
    folder = tmp_path / "checkpoints" / "sft-final"
    save(folder, tiny_model(0, tied=False))
    for other, words in ((tiny_model(0), "not in the model"), (tiny_model(0, tied=False).bfloat16(), "bfloat16")):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(SetupError, match=words) as caught:
            ck.load_weights_into(folder, other)
        assert caught.value.code == "VRLT-M04"
        assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_state_must_be_json(tmp_path):
    folder = tmp_path / "checkpoints" / "sft-000001"
    for state in ({"loss": float("nan")}, {"tensor": torch.zeros(1)}):
        with pytest.raises((TypeError, ValueError)):
            save(folder, tiny_model(0), state=state)
    assert not folder.parent.exists()
