"""The memory estimate against what is there: parameters and states to the byte, saved tensors within 10 %."""

from __future__ import annotations

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch

from vrlt_fast.cli import main
from vrlt_fast.config import LoraConfig, PromptConfig, VideoConfig
from vrlt_fast.config_load import dump_toml
from vrlt_fast.data.readers import read_jsonl, resolve_images, resolve_video
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import build_layout, response_row
from vrlt_fast.model.load import enable_recompute, inspect_model, load_model
from vrlt_fast.model.lora import add_lora
from vrlt_fast.model.prompt import encode_prompt
from vrlt_fast.model.tiny import build_tiny
from vrlt_fast.model.vision import VisionEmbeds, shared_vision
from vrlt_fast.train import fit as fit_module
from vrlt_fast.train.fit import fit_of, memory_of
from vrlt_fast.train.memory import COPIES, PassSize, Text, Tower, estimate, least, pass_size
from vrlt_fast.train.optim import make_optimizer, named_trainable
from vrlt_fast.train.plan import largest, update_units
from vrlt_fast.train.scored import ScoredGroup
from vrlt_fast.train.setup import read_inputs
from vrlt_fast.video.cache import ClipLoader
from vrlt_fast.video.images import ImageLoader

GB = 10**9


@pytest.fixture(scope="module")
def folders(demo, tiny_folder, tmp_path_factory):
    made = {f: tmp_path_factory.mktemp(f) / "m" for f in ("qwen2_vl", "qwen3_vl")}
    for family, folder in made.items():
        build_tiny(folder, train_jsonl=demo / "train.jsonl", seed=1, family=family)
    return {**made, "qwen2_5_vl": tiny_folder}


def part(config, name, **sizes):
    info = inspect_model(config.model.name)
    found = estimate(info, config, **{"tokens": 500, "patches": 800, "device": "cpu", "capacity": GB, **sizes})
    return sum(p.nbytes for p in found.parts if p.name == name)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    ("rank", "frozen", "dtype", "states"),
    [
        (0, False, "float32", "float32"),
        (0, True, "bfloat16", "float32"),
        (3, False, "bfloat16", "bfloat16"),
        (3, True, "float32", "bfloat16"),
    ],
)
def test_weights_gradients_and_states_to_the_byte(make_config, folders, family, rank, frozen, dtype, states):
    if rank:
        pytest.importorskip("peft")
    model = {"name": str(folders[family]), "dtype": dtype, "freeze_vision": frozen}
    config = make_config(model=model, lora={"rank": rank}, optim={"states": states})
    lm = load_model(config.model)
    plain = sum(p.nbytes for p in lm.module.parameters())
    if rank:
        add_lora(lm, LoraConfig(rank=rank))
    assert part(config, "weights") == sum(p.nbytes for p in lm.module.parameters())
    assert part(config, "reference") == (0 if rank and frozen else plain)
    optimizer = make_optimizer(lm, config.optim, 1e-3)
    for _, p in named_trainable(lm):
        p.grad = torch.zeros_like(p)
    assert part(config, "gradients") == sum(p.grad.nbytes for _, p in named_trainable(lm))
    optimizer.update()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    held += sum(m.nbytes for m in optimizer.copies().values())
    assert part(config, "optimizer") == held


def saved_bytes(lm, run):
    """Bytes of the storages that autograd keeps in ``run``, but for those of parameters."""
    own = {p.untyped_storage().data_ptr() for p in lm.module.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = run()
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(n for place, n in found.items() if place not in own), out


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("how", [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "torch")])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_autograd_keeps(make_config, folders, demo, seed, family, how, recompute):
    dtype, layers = how
    model = {"name": str(folders[family]), "dtype": dtype}
    video = {"max_pixels": 50176, "min_pixels": 12544}
    config = make_config(model=model, kernels={"layers": layers}, train={"recompute": recompute}, video=video)
    lm = load_model(config.model, layers=layers)
    if recompute:
        enable_recompute(lm)
    sample = read_jsonl(demo / "train.jsonl")[0]
    clip = ClipLoader(VideoConfig(**config.video.model_dump()), lm.info.geometry).load(resolve_video(sample, demo))
    prompt = encode_prompt(lm.info, sample, clip, PromptConfig(video_layout="interleaved", think=False))
    rng = random.Random(seed)
    rows = [response_row(prompt, [rng.randrange(500) for _ in range(rng.randint(20, 90))]) for _ in range(5)]
    layout = build_layout([prompt], [rows])
    size = PassSize(layout.spans.tokens, len(layout.targets))
    e, text, tower = lm.dtype.itemsize, Text.of(lm.info, config, "cpu"), Tower.of(lm.info, config, "cpu")

    patches = clip.n_tokens * lm.info.geometry.merge**2
    kept, vision = saved_bytes(lm, lambda: shared_vision(lm, [prompt]))
    again = tower.block(e) * patches if recompute else 0  # runs again in the backward pass, and is gone by now
    assert tower.activations(patches, e, recompute=recompute) - again == pytest.approx(kept, rel=0.1)

    lm.module.model.visual.requires_grad_(False)
    seen = VisionEmbeds(vision.embeds.detach(), tuple(d.detach() for d in vision.deepstack))
    kept, _ = saved_bytes(lm, lambda: target_logprobs(lm, layout, seen))
    expected = text.activations(size, e, recompute=recompute) + text.head(size, e, trained=False)
    expected -= size.tokens * (4 * text.hidden + 3 * text.inner) * e  # of the backward pass
    expected -= size.tokens * text.layer(e) if recompute else 0
    assert expected == pytest.approx(kept, rel=0.1)


def test_the_largest_pass_by_hand(make_config):
    def size(prompts=6, replicas=1, sp=1, **train):
        rollout = {"group_size": 4, "prompts": prompts, "max_new_tokens": 50}
        return pass_size(make_config(rollout=rollout, train=train, parallel={"replicas": replicas, "sp": sp}), 100)

    assert size(micro_rows=4) == PassSize(300, 200)
    assert size(micro_rows=11) == PassSize(600, 400)
    assert size(micro_rows=64) == PassSize(6 * 300, 6 * 200)
    assert size(micro_rows=64, replicas=4) == PassSize(2 * 300, 2 * 200)
    assert size(micro_rows=1) == PassSize(300, 200)  # at least one group
    assert size(micro_rows=4, sp=2) == PassSize(150, 100)
    assert size(micro_rows=4, sp=3) == PassSize(34 + 2 * 50, 2 * 50)
    assert size(micro_tokens=75, sp=2) == PassSize(50 + 50, 50, behind=50)
    assert size(micro_tokens=700) == PassSize(600, 400)
    assert size(micro_tokens=299) == PassSize(250, 150, behind=100)
    assert size(micro_tokens=1) == PassSize(150, 50, behind=100)
    assert size(micro_rows=4, prefix="replicated") == PassSize(600, 200)


def test_units_of_a_step_are_no_larger(make_config, seed):
    rng = random.Random(seed)
    for _ in range(200):
        prompt, length, rows, groups = rng.randint(1, 90), rng.randint(1, 40), rng.randint(2, 6), rng.randint(1, 5)
        train = {"micro_rows": rng.randint(1, 30), "micro_tokens": rng.choice([0, 1, 50, 200, 900])}
        rollout = {"group_size": rows, "prompts": groups, "max_new_tokens": length}
        made = [SimpleNamespace(tokens=(0,) * length) for _ in range(rows)]
        group = SimpleNamespace(request=SimpleNamespace(prompt=range(prompt)), completions=made)
        scored = [ScoredGroup(group, (), (), (1.0,) * rows, tuple(range(rows))) for _ in range(groups)]
        largest_unit = largest(update_units(scored, train["micro_rows"], train["micro_tokens"]))
        assert pass_size(make_config(rollout=rollout, train=train), prompt).tokens == largest_unit


def test_keys_and_values_that_processes_gather(make_config):
    """Of all tokens of a pass, whatever the number of processes; heads that are exchanged need none."""
    name, text = "gathered keys and values", inspect_model(make_config().model.name).config.text_config
    one = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    shared = make_config(parallel={"sp": 2}, train={"micro_rows": 1}, rollout={"group_size": 4, "max_new_tokens": 50})
    assert part(shared, name) == COPIES * one * (500 + 4 * 50)
    assert part(make_config(), name) == 0
    assert part(make_config(parallel={"sp": 2, "sequence": "ulysses"}), name) == 0


def test_what_lowers_it_lowers_it(make_config):
    def total(device="cpu", **changes):
        config = make_config(**changes)
        info = inspect_model(config.model.name)
        return estimate(info, config, tokens=2000, patches=8000, device=device, capacity=20 * GB).total

    base = {"rollout": {"group_size": 8, "prompts": 4, "max_new_tokens": 300}}
    whole = total(**base)
    for changes in (
        {"train": {"recompute": True}},
        {"train": {"micro_tokens": 3000}},
        {"train": {"micro_rows": 8}},
        {"model": {"freeze_vision": True}},
        {"model": {"dtype": "bfloat16"}},
        {"grpo": {"beta": 0.0}},
        {"parallel": {"replicas": 2}},
        {"rollout": {**base["rollout"], "kv_gb": 0.01}},
    ):
        assert total(**{**base, **changes}) < whole, changes
    narrow = {**base, "model": {"dtype": "bfloat16"}}
    assert total(**narrow, optim={"states": "bfloat16"}) < total(**narrow)
    assert total("cuda", **base) > whole  # transformers' own norms keep more
    config = make_config(**base)
    info = inspect_model(config.model.name)
    smallest = estimate(info, least(config), tokens=2000, patches=8000, device="cpu", capacity=20 * GB)
    assert smallest.total < whole
    assert sum(p.nbytes for p in smallest.parts if p.name == "keys and values") == 2600 * 4 * 4 * 2 * 2 * 32


def test_the_longest_prompt_is_the_longest(make_config, demo):
    for layout in ("native", "interleaved"):
        config = make_config(prompt={"video_layout": layout, "think": True})
        inputs = read_inputs(config)
        info, clips = inputs.info, ClipLoader(config.video, inputs.info.geometry)
        loader = ImageLoader(config.video, info.geometry)
        made = []
        for sample in inputs.train:
            images = [loader.load(path) for path in resolve_images(sample, demo)]
            clip = clips.load(resolve_video(sample, demo))
            made.append(encode_prompt(info, sample, clip, config.prompt, images=images))
        longest = inputs.longest
        assert longest is not None
        assert longest.tokens == pytest.approx(max(map(len, made)), rel=0.15)
        assert len(made[longest.sample]) >= 0.9 * max(map(len, made))
        assert longest.patches == 4 * sum(clip.n_tokens for clip in made[longest.sample].media)


def check_command(config, folder, *words):
    file = folder / "run.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    return main(["check", str(file), *words])


def test_check_prints_a_table(make_config, tmp_path, capsys):
    assert check_command(make_config(), tmp_path, "--train.recompute", "true") == 0
    out, told = capsys.readouterr()
    assert told == ""
    names = ("weights", "reference", "gradients", "optimizer", "keys and values", "vision, trained", "host memory")
    assert all(name in out for name in (*names, "activations of", "logits and head", "most at a time"))
    assert not (tmp_path / "run").exists()
    assert main(["train", str(tmp_path / "run.toml"), "--dry-run"]) == 0
    assert "\nmemory    0." in capsys.readouterr().out


def test_check_refuses_what_cannot_fit(make_config, tiny_folder, tmp_path, capsys):
    """From config.json alone: the weights in the folder are of another model."""
    folder = shutil.copytree(tiny_folder, tmp_path / "huge")
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tree["text_config"]["intermediate_size"] = 10**11
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    assert check_command(make_config(model={"name": str(folder)}), tmp_path) == 4
    out, told = capsys.readouterr()
    assert "weights" in out
    assert "VRLT-E07" in told
    assert "lora.rank" in told


def test_what_fits_in_pieces_is_no_error(make_config, tmp_path, capsys, monkeypatch):
    config = make_config(rollout={"group_size": 16, "prompts": 8, "max_new_tokens": 2000})
    inputs = read_inputs(config)
    found = fit_of(config, inputs)
    between = (found.smallest.total + found.estimate.total) // 2
    monkeypatch.setattr(fit_module, "memory_of", lambda device, processes: (between, "this device"))
    assert check_command(config, tmp_path) == 0
    out = capsys.readouterr().out
    assert "GB too much as configured" in out
    assert "smaller pieces" in out


def test_processes_share_a_machine():
    alone, name = memory_of(torch.device("cpu"), 1)
    assert alone > 10**8
    assert memory_of(torch.device("cpu"), 3) == (alone // 3, name)
