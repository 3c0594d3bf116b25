"""Memory of an update at a released model's vocabulary: logits of a whole sequence never exist."""

from __future__ import annotations

import subprocess
import sys
import textwrap

VOCABULARY, PROMPT, ROWS, LENGTH = 151_936, 6000, 4, 50

SCRIPT = f"""
import copy, resource, sys
import torch
from vrlt_fast.config import ModelConfig, PromptConfig
from vrlt_fast.data.sample import Sample
from vrlt_fast.model.attention import PASS
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import build_layout, response_row
from vrlt_fast.model.load import MODELS, VideoLM, inspect_model
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.vision import shared_vision

info = inspect_model(sys.argv[1])
config = copy.deepcopy(info.config)
config.text_config.vocab_size, config.text_config.num_hidden_layers = {VOCABULARY}, 1
config.text_config.layer_types = ["full_attention"]
config.text_config.max_position_embeddings = 32768
lm = VideoLM(info, MODELS[info.family](config))
lm.module.model.language_model.config._attn_implementation = PASS


def update(tokens):
    sample = Sample(id="a", video="a.mp4", duration=1.0, task="grounding", question="?", spans=((0.0, 1.0),))
    none = torch.zeros(0, dtype=torch.int64)
    positions = torch.arange(tokens).expand(3, -1)
    prompt = Prompt(sample, (), PromptConfig(), "", torch.arange(tokens) % 500, positions, none, tokens)
    rows = [response_row(prompt, list(range(9, 9 + {LENGTH}))) for _ in range({ROWS})]
    logp, _ = target_logprobs(lm, build_layout([prompt], [rows]), shared_vision(lm, [prompt]))
    torch.autograd.backward(logp.sum())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


print(update(10), update({PROMPT}))
"""


def test_logits_of_a_whole_sequence_never_exist(tiny_folder):
    """Against a prompt of ten tokens: what the longer one needs more is its activations, a small part of its logits."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    short, long = map(int, done.stdout.split())
    assert long - short < PROMPT * VOCABULARY * 4 / 10, (short, long)
