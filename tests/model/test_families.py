"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with videos and images, against transformers' own models and processors."""

from __future__ import annotations

import json
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from vrlt_fast.config import ModelConfig, PromptConfig
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.errors import DataError, SetupError
from vrlt_fast.model import vision
from vrlt_fast.model.language import target_hidden, target_logprobs
from vrlt_fast.model.layers import set_layers
from vrlt_fast.model.layout import build_layout, response_row
from vrlt_fast.model.load import MODELS, enable_recompute, load_model
from vrlt_fast.model.positions import mrope_positions
from vrlt_fast.model.prompt import IMAGE_SLOT, SLOT, encode_media, encode_prompt, render
from vrlt_fast.model.replicated import verify_shared_prefix
from vrlt_fast.model.tiny import build_tiny
from vrlt_fast.model.vision import VisionEmbeds, concat, encode_clips, normalise, shared_vision
from vrlt_fast.rollout.engine import generate
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.video.preprocess import Clip

pytestmark = pytest.mark.usefixtures("one_torch_thread")
PROMPT = PromptConfig(think=False)
LINE = {
    "id": "a",
    "video": "a.mp4",
    "duration": 8.5,
    "task": "videoqa",
    "question": "Which colour comes first?",
    "options": ["red", "green"],
    "answer": "A",
}
PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


def open_tiny(folder, *, freeze):
    return load_model(ModelConfig(name=str(folder), dtype="float32", device="cpu", freeze_vision=freeze))


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request, tmp_path_factory):
    """A tiny model of each family."""
    made = tmp_path_factory.mktemp(request.param)
    (made / "train.jsonl").write_text(json.dumps(LINE) + "\n")
    return build_tiny(made / "model", train_jsonl=made / "train.jsonl", seed=2, family=request.param)


@pytest.fixture(scope="module")
def lm(folder):
    return open_tiny(folder, freeze=False)


@pytest.fixture(scope="module")
def sample(folder):
    return read_jsonl(folder.parent / "train.jsonl", check_files=False)[0]


@pytest.fixture(scope="module")
def theirs(folder, lm):
    """transformers' model as it comes: its own attention and patch embedding."""
    return MODELS[lm.info.family].from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


@pytest.fixture
def clips(lm, seed):
    """Random pictures: a video of 4 frame pairs and two images of other sizes."""
    generator = torch.Generator().manual_seed(seed)

    def make(kind, grid, times, key):
        (t, h, w), geometry = grid, lm.info.geometry
        patches = torch.randint(0, 256, (t * h * w, 6 * geometry.patch**2), generator=generator, dtype=torch.uint8)
        return Clip(patches, grid, times, 1.0 if kind == "video" else 0.0, key, geometry, kind)

    return {
        "video": make("video", (4, 4, 6), tuple(i / 2 for i in range(8)), "v"),
        "image": make("image", (1, 6, 4), (0.0, 0.0), "i"),
        "other": make("image", (1, 2, 8), (0.0, 0.0), "o"),
    }


def pixels(lm, clips):
    """Inputs of transformers' models for these clips."""
    inputs = {}
    for kind, name, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        found = [clip for clip in clips if clip.kind == kind]
        if found:
            inputs[name] = normalise(lm, torch.cat([clip.patches for clip in found]))
            inputs[grid] = torch.tensor([clip.grid for clip in found])
    return inputs


def prompts_of(lm, sample, clips):
    """A video; two images; an image and a video."""
    return [
        encode_prompt(lm.info, sample, clips["video"], PROMPT),
        encode_prompt(lm.info, sample, None, PROMPT, images=[clips["image"], clips["other"]]),
        encode_prompt(lm.info, sample, clips["video"], PROMPT, images=[clips["image"]]),
    ]


def test_a_tiny_model_is_of_its_family(lm, folder):
    family = lm.info.family
    assert type(lm.module) is MODELS[family]
    assert lm.info.geometry.patch == (16 if family == "qwen3_vl" else 14)
    assert lm.info.frame_blocks == (family == "qwen3_vl")
    assert (lm.info.mean == (0.5, 0.5, 0.5)) == (family == "qwen3_vl")
    config = lm.module.config
    if family == "qwen3_vl":
        assert len(config.vision_config.deepstack_visual_indexes) >= 2
        assert config.text_config.head_dim * config.text_config.num_attention_heads == config.text_config.hidden_size
        assert lm.module.model.visual.patch_embed.proj.bias is not None


@pytest.mark.parametrize("freeze", [False, True])
def test_the_tower_gives_what_transformers_gives(lm, folder, theirs, clips, freeze):
    opened = open_tiny(folder, freeze=freeze) if freeze else lm
    with torch.no_grad():
        inputs = pixels(lm, clips.values())
        video = theirs.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        images = theirs.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    ours = encode_clips(opened, [clips["image"], clips["video"], clips["other"]])
    assert ours.requires_grad is not freeze
    found = ours.split([clips[name].n_tokens for name in ("image", "video", "other")])
    expected = [images.pooler_output[0], video.pooler_output[0], images.pooler_output[1]]
    torch.testing.assert_close([piece.embeds for piece in found], expected, atol=1e-5, rtol=1e-5)
    assert len(ours.deepstack) == (2 if lm.info.family == "qwen3_vl" else 0)
    for layer, tokens in enumerate(ours.deepstack):
        # before 5.24 transformers doesn't cut them by image
        deep_images, deep_video = (
            torch.cat(list(feature)) if isinstance(feature, tuple) else feature
            for feature in (images.deepstack_features[layer], video.deepstack_features[layer])
        )
        first, second = deep_images.split([clips["image"].n_tokens, clips["other"].n_tokens])
        wanted = torch.cat([first, deep_video, second])
        torch.testing.assert_close(tokens, wanted, atol=1e-5, rtol=1e-5)


def test_pieces_of_clips_give_what_whole_clips_give(lm, clips, monkeypatch):
    """Down to a frame pair at a time, forward and backward."""
    wanted, found = [clips[name] for name in ("image", "video", "other")], []
    for most in (10**6, 100, 1):
        monkeypatch.setattr(vision, "PIECE", {"cpu": most})
        made = encode_clips(lm, wanted)
        tower = lm.module.model.visual
        torch.autograd.backward([(t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in made.tensors])
        found.append([*(t.detach() for t in made.tensors), *(p.grad for p in tower.parameters() if p.grad is not None)])
        lm.module.zero_grad()
    for other in found[1:]:
        for ours, right in zip(other, found[0], strict=True):
            assert float((ours - right).norm()) <= 1e-5 * float(right.norm())


def test_logits_and_gradients_are_those_of_transformers(lm, theirs, sample, clips, seed):
    prompts = prompts_of(lm, sample, clips)
    responses = [[[5, 6, 7], [8]], [[9, 10]], [[11, 12, 13, 14]]]
    rows = [[response_row(p, r) for r in group] for p, group in zip(prompts, responses, strict=True)]
    layout = build_layout(prompts, rows)
    weight = torch.randn(len(layout.targets), generator=torch.Generator().manual_seed(seed))

    def gradients(module, logits):
        module.zero_grad()
        (logits.log_softmax(-1).gather(1, layout.targets[:, None])[:, 0] * weight).sum().backward()
        found = {name: p.grad for name, p in module.named_parameters()}
        module.zero_grad()
        return found

    logits = lm.module.lm_head(target_hidden(lm, layout, shared_vision(lm, prompts)))
    expected = []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            ids = torch.cat([prompt.ids, torch.tensor(response)])[None]
            after = torch.arange(len(response)).expand(3, -1) + prompt.next_position
            positions = torch.cat([prompt.positions, after], dim=1)[:, None]
            out = theirs(input_ids=ids, position_ids=positions, use_cache=False, **pixels(lm, prompt.media))
            expected.append(out.logits[0, len(prompt) - 1 : -1])
    wanted = torch.cat(expected)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    mine, reference = gradients(lm.module, logits), gradients(theirs, wanted)
    for name, grad in reference.items():
        scale = grad.abs().max().clamp(min=1e-3)
        assert float((mine[name] - grad).abs().max() / scale) < 1e-4, name
    assert all(grad.any() for name, grad in mine.items() if "merger" in name)


def test_rollouts_have_the_log_probs_that_are_trained_on(lm, sample, clips):
    prompts = prompts_of(lm, sample, clips)
    groups, stats = generate(lm, [RolloutRequest(p, 2, Sampling(5, 1.0), seed=i) for i, p in enumerate(prompts)])
    rows = [[response_row(g.request.prompt, c.tokens) for c in g.completions] for g in groups]
    layout = build_layout(prompts, rows)
    with torch.no_grad():
        scored, _ = target_logprobs(lm, layout, shared_vision(lm, prompts))
    torch.testing.assert_close(
        torch.cat([c.logprobs for g in groups for c in g.completions]), scored, atol=1e-4, rtol=0
    )
    assert stats.frames_encoded == 8 + 2 + 2


@pytest.mark.parametrize("piece", [0, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_shared_prefixes_are_verified(folder, sample, clips, seed, recompute, piece):
    """fp32: videos and images, groups of 1, 2 and 8 ragged rows, packed or in stages."""
    lm = open_tiny(folder, freeze=False)
    if recompute:
        enable_recompute(lm)
    generator = torch.Generator().manual_seed(seed)
    prompts = prompts_of(lm, sample, clips)
    rows = [
        [response_row(p, torch.randint(9, 200, (n,), generator=generator).tolist()) for n in lengths]
        for p, lengths in zip(prompts, ([3], [1, 7], [5, 2, 9, 1, 4, 3, 8, 6]), strict=True)
    ]
    found = verify_shared_prefix(lm, prompts, rows, 1.2, piece=piece)
    assert found.logprob < 1e-5
    assert found.gradient < 2e-5, found.parameter
    assert all(p.grad is None for p in lm.module.parameters())


def test_fused_layers_are_the_models_own(folder, sample, clips, seed):
    lm, found = open_tiny(folder, freeze=False), []
    prompts = prompts_of(lm, sample, clips)
    tokens = torch.randint(9, 200, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    layout = build_layout(prompts, [[response_row(p, tokens), response_row(p, tokens[:1])] for p in prompts])
    for layers in ("auto", "torch"):
        set_layers(lm.module, layers)
        text = lm.module.model.language_model
        assert [hasattr(type(m), "plain") for m in (text.norm, text.layers[0].mlp)] == [layers == "auto"] * 2
        lm.module.zero_grad()
        logp, _ = target_logprobs(lm, layout, shared_vision(lm, prompts))
        logp.sum().backward()
        found.append((logp.detach(), {n: p.grad for n, p in lm.module.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for name, expected in found[1][1].items():
        assert (found[0][1][name] - expected).norm() < 2e-5 * expected.norm() + 1e-9, name


def test_rollouts_have_the_log_probs_of_transformers_full_forward(lm, theirs, sample, clips, seed):
    """Groups of 1 and 8 ragged rows in one call, no prefix shared on the other side."""
    prompts = prompts_of(lm, sample, clips)
    requests = [
        RolloutRequest(p, n, Sampling(length, 1.0), seed=seed + i)
        for i, (p, n, length) in enumerate(zip(prompts, (8, 1, 8), (9, 4, 6), strict=True))
    ]
    groups, _ = generate(lm, requests)
    for group in groups:
        prompt = group.request.prompt
        for completion in group.completions:
            ids = torch.cat([prompt.ids, torch.tensor(completion.tokens)])[None]
            after = torch.arange(len(completion.tokens)).expand(3, -1) + prompt.next_position
            with torch.no_grad():
                logits = theirs(
                    input_ids=ids,
                    position_ids=torch.cat([prompt.positions, after], dim=1)[:, None],
                    use_cache=False,
                    **pixels(lm, prompt.media),
                ).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
            torch.testing.assert_close(completion.logprobs, expected, atol=1e-5, rtol=0)


def test_a_clip_that_stands_twice_is_encoded_once(lm, sample, clips, monkeypatch):
    prompts = prompts_of(lm, sample, clips)
    encoded = []
    tower = lm.module.model.visual
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda x, grid_thw: encoded.append(len(x)) or forward(x, grid_thw=grid_thw))
    with torch.no_grad():
        once = shared_vision(lm, prompts)
        assert encoded == [sum(len(clip.patches) for clip in clips.values())]
        each = concat([encode_clips(lm, [clip]) for p in prompts for clip in p.media])
    for ours, wanted in zip(once.tensors, each.tensors, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert len(once) == len(once.embeds) == sum(len(p.visual) for p in prompts)


def test_pieces_of_embeddings_come_together_again():
    whole = VisionEmbeds(torch.randn(7, 3), (torch.randn(7, 3), torch.randn(7, 3)))
    pieces = whole.split([2, 0, 5])
    assert [len(piece) for piece in pieces] == [2, 0, 5]
    assert all(torch.equal(a, b) for a, b in zip(concat(pieces).tensors, whole.tensors, strict=True))


def test_what_a_prompt_shows_stands_in_order(lm, sample, clips):
    video, images, both = prompts_of(lm, sample, clips)
    assert both.media == (clips["image"], clips["video"])
    assert both.clip is video.clip is clips["video"]
    assert both.media_key == ("i", "v")
    with pytest.raises(ValueError, match="no video"):
        _ = images.clip
    for prompt in (video, images, both):
        seen = prompt.ids[prompt.visual].tolist()
        names = {"image": lm.info.image_token, "video": lm.info.video_token}
        assert seen == [names[clip.kind] for clip in prompt.media for _ in range(clip.n_tokens)]
        assert set(prompt.ids.tolist()) & {lm.info.image_token, lm.info.video_token} == set(seen)
        assert prompt.text.index(sample.question) > prompt.text.rindex("<|vision_end|>")
    blocks = clips["video"].grid[0] if lm.info.frame_blocks else 1
    assert video.text.count(SLOT) == blocks
    assert images.text.count(IMAGE_SLOT) == 2


def stub(lm):
    """What the replacing methods of transformers' processors use of them, without torchvision."""
    merge = SimpleNamespace(merge_size=lm.info.geometry.merge, temporal_patch_size=2)
    return SimpleNamespace(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        image_processor=merge,
        video_processor=merge,
    )


def test_ids_are_those_of_transformers_processor(lm, sample, clips):
    family = lm.info.family
    module = import_module(f"transformers.models.{family}.processing_{family}")
    processor, self = getattr(module, PROCESSORS[family]), stub(lm)
    if family == "qwen3_vl":
        self._calculate_timestamps = lambda *args: processor._calculate_timestamps(self, *args)
    metadata = SimpleNamespace(fps=10.0, frames_indices=[5 * i for i in range(8)])
    inputs = {"video_grid_thw": torch.tensor([clips["video"].grid]), "video_metadata": [metadata]}
    shown = processor.replace_video_token(self, inputs, 0)
    image = processor.replace_image_token(self, {"image_grid_thw": torch.tensor([clips["image"].grid])}, 0)
    # transformers leaves the slot's own tokens around the blocks of Qwen3-VL; the release replaced the whole slot
    video_slot = SLOT if lm.info.frame_blocks else "<|video_pad|>"
    text = render(lm.info, sample, PROMPT, images=1).replace("<|image_pad|>", image).replace(video_slot, shown)
    prompt = encode_prompt(lm.info, sample, clips["video"], PROMPT, images=[clips["image"]])
    assert prompt.ids.tolist() == lm.info.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_positions_are_those_of_transformers_where_it_is_right(lm, theirs, sample, clips):
    """Images of all families, and videos of Qwen3-VL; other videos follow the models' release (test_positions.py)."""
    prompts = [encode_prompt(lm.info, sample, None, PROMPT, images=[clips["image"], clips["other"], clips["image"]])]
    prompts += prompts_of(lm, sample, clips) if lm.info.family == "qwen3_vl" else []
    for prompt in prompts:
        ids = prompt.ids[None]
        kinds = torch.where(ids == lm.info.image_token, 1, torch.where(ids == lm.info.video_token, 2, 0))
        grids = {name: grid for name, grid in pixels(lm, prompt.media).items() if name.endswith("thw")}
        found, delta = theirs.model.get_rope_index(
            input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **grids
        )
        assert torch.equal(found[:, 0], prompt.positions)
        assert int(delta) == prompt.next_position - len(prompt)


def test_timestamps_between_frame_pairs_for_every_family(lm, sample, clips):
    """Each frame pair is then a grid of its own."""
    asked = PromptConfig(think=False, video_layout="interleaved")
    prompt = encode_prompt(lm.info, sample, clips["video"], asked, images=[clips["image"]])
    assert [f"<{t:.1f} seconds>{SLOT}" in prompt.text for t in (0.25, 1.25, 2.25, 3.25)] == [True] * 4
    positions, after = mrope_positions(
        prompt.ids,
        [(1, 4, 6)] * 4,
        [1.0] * 4,
        family="qwen2_vl",
        video_token=lm.info.video_token,
        image_grids=[(1, 6, 4)],
        image_token=lm.info.image_token,
    )
    assert torch.equal(prompt.positions, positions)
    assert prompt.next_position == after


def test_what_is_refused(lm, sample, clips, monkeypatch):
    with pytest.raises(ValueError, match="nothing to see"):
        encode_prompt(lm.info, sample, None, PROMPT)
    with pytest.raises(ValueError, match="slots"):
        encode_media(lm.info, f"{SLOT}{IMAGE_SLOT}", [clips["image"], clips["video"]])
    with pytest.raises(DataError, match="VRLT-D10") as caught:
        encode_prompt(lm.info, sample, clips["video"], PROMPT, images=[clips["image"]], reserve=lm.info.context)
    assert "videos have 24 tokens, images 6" in str(caught.value)
    monkeypatch.setattr(lm.info.tokenizer, "chat_template", "{{ messages[0]['role'] }}")
    with pytest.raises(SetupError, match="VRLT-M03"):
        encode_prompt(lm.info, sample, clips["video"], PROMPT)
