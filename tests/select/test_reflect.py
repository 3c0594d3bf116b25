"""Partial annotations found by a model that is real but for its weights: it says the same time of every video."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from vrlt_fast.cli import main
from vrlt_fast.config_load import load_config
from vrlt_fast.data.quarantine import read_quarantine, write_quarantine
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.select.curriculum import find_partial
from vrlt_fast.select.reflect import reflect

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SAID = (1.0, 4.0)


def says(tiny: Path, out: Path, text: str) -> Path:
    """A copy of a model whose layers add nothing to the last token's embedding, with a head that knows what follows it:
    the text, of tokens that are all different, after any prompt.
    """
    shutil.copytree(tiny, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt_end = tokenizer("<|im_start|>assistant\n")["input_ids"][-1]
    chain = [prompt_end, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain)
    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        if "visual" not in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name].zero_()
    (embedding,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    head = torch.zeros_like(embedding)
    for token, following in pairwise(chain):
        head[following] = embedding[token] / embedding[token].norm()
    save_file({**tensors, "lm_head.weight": head}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text("utf-8"))
    for part in (config, config["text_config"]):
        part["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def speaker(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    start, end = SAID
    folder = tmp_path_factory.mktemp("speaker") / "model"
    return says(tiny_folder, folder, f"<answer>{start} to {end}</answer>")


@pytest.fixture
def ask(workplace: Path, speaker: Path, monkeypatch: pytest.MonkeyPatch):
    """``vrlt select reflect`` with this model; the exit code."""
    monkeypatch.chdir(workplace)

    def run(out: Path, *more: str, model: Path = speaker) -> int:
        words = ["--model.name", str(model), "--rollout.max_new_tokens", "9", "--eval.prompts", "4", *more]
        return main(["select", "reflect", "recipe.toml", "--out", str(out), *words])

    return run


def by_hand(data: Path) -> dict[int, bool]:
    """By the line of each sample with spans, whether half of what is said, and a second, lies outside of them."""
    found = {}
    for number, line in enumerate(data.read_text("utf-8").splitlines(), 1):
        fields = json.loads(line)
        if "spans" in fields:
            start, end = SAID[0], min(SAID[1], fields["duration"])
            inside = sum(max(0.0, min(end, e) - max(start, s)) for s, e in fields["spans"])
            beyond = end - start - inside
            found[number] = beyond >= max(0.5 * (end - start), 1.0)
    return found


def test_the_lines_of_partial_samples_are_listed(ask, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, expected = tmp_path / "partial.jsonl", by_hand(demo / "train.jsonl")
    assert set(expected.values()) == {True, False}, "the demo must have both"
    assert ask(out) == 0
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["line"] for row in rows] == [number for number, partial in expected.items() if partial]
    assert {tuple(row["codes"]) for row in rows} == {("VRLT-L04",)}
    left = {int(s.line.partition(":")[2]) for s in read_jsonl(demo / "train.jsonl", leave_out=read_quarantine(out))}
    whole = len((demo / "train.jsonl").read_text("utf-8").splitlines())
    assert left == {number for number in range(1, whole + 1) if not expected.get(number)}
    said = capsys.readouterr().out
    assert f"{len(expected)} samples asked, {whole - len(expected)} without spans passed over" in said
    assert f"{len(rows)} annotated in part only, 0 failed, 0 answers without a span" in said
    assert f"--data.quarantine {out}" in said

    again = tmp_path / "again.jsonl"
    assert ask(again, "--data.quarantine", str(out)) == 0
    assert again.read_bytes() == out.read_bytes(), "what is listed isn't asked again, and stays listed"
    assert f"{len(expected) - len(rows)} samples asked" in capsys.readouterr().out


def test_broken_videos_and_lines_listed_before(ask, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = shutil.copytree(demo, tmp_path / "data")
    file, listed = data / "train.jsonl", tmp_path / "bad.jsonl"
    held_out = write_quarantine(listed, data / "heldout.jsonl", {1: ["VRLT-V02"]})
    first = next(s for s in read_jsonl(file) if s.wants_spans)
    (data / first.video).write_bytes(b"not a video")
    lost = sum(s.wants_spans and s.video == first.video for s in read_jsonl(file))
    lost_lines = {int(s.line.partition(":")[2]) for s in read_jsonl(file) if s.video == first.video}
    before = listed.read_text("utf-8")
    assert ask(listed, "--data.train", str(file), "--data.quarantine", str(listed)) == 0
    told = capsys.readouterr()
    assert f"{lost} failed" in told.out
    assert "VRLT-V02" in told.out + told.err
    text = listed.read_text("utf-8")
    assert text.startswith(before)
    rows = [json.loads(line) for line in text.splitlines()[held_out:]]
    expected = [number for number, partial in by_hand(file).items() if partial and number not in lost_lines]
    assert [row["line"] for row in rows] == expected
    for video in (data / "videos").iterdir():
        video.write_bytes(b"not a video")
    assert ask(listed, "--data.train", str(file)) == 3
    assert listed.read_text("utf-8") == text


def test_answers_without_a_span_are_no(ask, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As an untrained model gives them."""
    out = tmp_path / "partial.jsonl"
    assert ask(out, model=tiny_folder) == 0
    assert out.read_bytes() == b""
    said = capsys.readouterr().out
    asked = int(said.split(" samples asked")[0].split()[-1])
    assert f"0 annotated in part only, 0 failed, {asked} answers without a span" in said


@pytest.mark.parametrize(
    ("more", "code", "exit_code"),
    [
        (["--prompt.grammar", "video_r1"], "VRLT-D14", 3),
        (["--data.tasks", '["videoqa"]'], "VRLT-C04", 2),
        (["--data.quarantine", "nowhere.jsonl"], "VRLT-D01", 3),
    ],
)
def test_what_is_refused_before_the_model_is_opened(ask, tmp_path, capsys, more: Sequence[str], code, exit_code):
    out = tmp_path / "partial.jsonl"
    assert ask(out, *more, model=tmp_path / "no model") == exit_code
    assert code in capsys.readouterr().err
    assert not out.exists()


def test_where_it_can_not_be_written(ask, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert ask(tmp_path / "no" / "partial.jsonl") == 4
    before = (demo / "train.jsonl").read_bytes()
    assert ask(demo / "train.jsonl") == 3
    assert (demo / "train.jsonl").read_bytes() == before
    told = capsys.readouterr().err
    assert "VRLT-R02" in told
    assert "VRLT-D13" in told


def test_a_run_that_is_stopped_leaves_the_older_list(workplace: Path, speaker: Path, tmp_path: Path):
    config = load_config([workplace / "recipe.toml"], {"model.name": str(speaker), "eval.prompts": 2})
    out = tmp_path / "partial.jsonl"
    out.write_text("older\n")
    seen = []

    def stop(done: int, todo: int) -> None:
        seen.append((done, todo))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reflect(config, out, stop)
    assert seen == [(2, len(by_hand(Path(config.data.train))))]
    assert [path.name for path in tmp_path.iterdir()] == ["partial.jsonl"]
    assert out.read_text() == "older\n"


def test_decisions_of_the_demo_by_hand(demo: Path):
    samples = [s for s in read_jsonl(demo / "train.jsonl") if s.wants_spans]
    expected = [s.id for s in samples if by_hand(demo / "train.jsonl")[int(s.line.partition(":")[2])]]
    assert find_partial({s.id: [SAID] for s in samples}, samples) == expected
