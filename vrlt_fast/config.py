"""The configuration: one frozen, typed tree. Defaults < TOML files (left to right) < command line.

Unknown keys are errors with a suggestion. Doesn't import torch. docs/config.md is generated from the descriptions here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vrlt_fast.config_base import Count, Positive, Section, Share
from vrlt_fast.config_rl import GrpoConfig, JudgeConfig, RewardConfig, ScorerConfig, SelectConfig, SftConfig


class ModelConfig(Section):
    name: str = ""
    """Folder of an HF model (config.json, safetensors, tokenizer), or a hub name that is in the local HF cache."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the weights and of the computation; bfloat16 weights are updated through fp32 copies."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is a device."""
    freeze_vision: bool = True
    """Keep the vision tower and its merger at their loaded weights."""


class LoraConfig(Section):
    rank: Count = 0
    """Rank of low-rank adapters beside linear layers of the language model, through the package peft; its other weights
    are frozen then. 0: none."""
    alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """An adapter adds alpha / rank times its product; 0: twice the rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the layers with adapters."""


class DataConfig(Section):
    train: str = ""
    """JSONL file of training samples (docs/data.md)."""
    eval: str = ""
    """JSONL file of held-out samples; empty: no evaluation."""
    root: str = ""
    """Folder that video paths are relative to, and may not leave; empty: the folder of the JSONL file."""
    tasks: tuple[str, ...] = ()
    """Train, and evaluate while training, on samples of these tasks alone; empty: all."""
    shuffle_options: bool = False
    """Put the options of every question into an order of its own, fixed by train.seed (SEED-Bench-R1)."""
    invert: Share = 0.0
    """Share of the questions with options that are negated: what was wrong is right then (TW-GRPO), by train.seed."""
    quarantine: str = ""
    """List of lines of both files to leave out, as `vrlt data check FILE --quarantine OUT` writes it; empty: none."""
    max_failed_share: Share = 0.05
    """Stop with exit 3 when more than this share of the last 500 videos failed (and at least 3 did)."""


class VideoConfig(Section):
    sampling: Literal["qwen_utils", "hf_qwen2", "hf_qwen3", "fps", "uniform", "keyframe", "jitter"] = "qwen_utils"
    """How frames are chosen: as qwen-vl-utils, transformers' Qwen2-VL or Qwen3-VL does; fps (exact multiples of
    1 / fps), uniform (always max_frames), keyframe (nearest ones), jitter (one at random of each equal part).
    """
    fps: Annotated[float, Field(gt=0.0, le=240.0)] = 2.0
    """Frames sampled per second of video (all but uniform)."""
    times: Literal["pts", "index"] = "pts"
    """What the model is told of a frame's time: pts (presentation time), index (number over mean rate, as peers do)."""
    min_frames: Annotated[int, Field(ge=2)] = 4
    """Fewest frames of one video."""
    max_frames: Annotated[int, Field(ge=2, le=8192)] = 64
    """Most frames of one video."""
    min_pixels: Positive = 100_352
    """Fewest pixels of one frame after resizing (100352 = 128 tokens of 28 x 28)."""
    max_pixels: Positive = 151_200
    """Most pixels of one frame after resizing."""
    image_min_pixels: Positive = 3_136
    """Fewest pixels of an image of the prompt after resizing (3136 = 4 tokens of 28 x 28)."""
    image_max_pixels: Positive = 1_003_520
    """Most pixels of an image of the prompt after resizing (1003520 = 1280 tokens of 28 x 28)."""
    decoder: Literal["auto", "dali", "torchcodec-cuda", "pyav", "torchcodec", "decord"] = "auto"
    """What decodes; auto: the first of this order that runs here (`vrlt doctor`) and can take the file."""
    workers: Annotated[int, Field(ge=-1)] = -1
    """Processes that decode, so that a crash or hang costs a sample only; -1: half the cores, at most 8; 0: none."""
    deadline: Annotated[float, Field(gt=0.0)] = 20.0
    """Seconds that a piece of decoding may take, on top of five times what it should; then its process is killed."""
    on_error: Literal["strict", "tolerant"] = "strict"
    """Of a frame that can't be decoded: leave the sample out (strict), or take the nearest frame and count it."""
    prefetch: Count = 2
    """Threads that load clips of the next steps ahead; 0: none."""
    cache_gb: Annotated[float, Field(ge=0.0)] = 4.0
    """Host memory for decoded patches, in GB (10^9 bytes); 0: none."""
    cache_shared: bool = False
    """Put them into shared memory (/dev/shm), once for all processes of the machine."""
    cache_gpu_gb: Annotated[float, Field(ge=0.0)] = 0.0
    """GPU memory for decoded patches, in GB."""
    cache_dir: str = ""
    """Folder on a local disk that keeps decoded patches and indices between runs; empty: none."""
    cache_disk_gb: Annotated[float, Field(ge=0.0)] = 100.0
    """Size of cache_dir, in GB."""

    @model_validator(mode="after")
    def _ordered(self) -> VideoConfig:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames {self.min_frames} is above max_frames {self.max_frames}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        if self.image_min_pixels > self.image_max_pixels:
            least, most = self.image_min_pixels, self.image_max_pixels
            raise ValueError(f"image_min_pixels {least} is above image_max_pixels {most}")
        return self


class PromptConfig(Section):
    video_layout: Literal["native", "interleaved"] = "native"
    """native: as the family was released: one block of video tokens, or with Qwen3-VL timestamps before frame pairs;
    interleaved: those timestamps for every family.
    """
    images: bool = True
    """Show the samples' images, before the video."""
    grammar: Literal[
        "plain", "temporal_r1", "video_r1", "videochat_r1", "tw_grpo", "seed_bench_r1", "video_thinker", "primo_r1",
        "sole_r1", "stvg_r1", "scene_r1", "boxed",
    ] = "plain"  # fmt: skip
    """How responses look: what the prompt asks for, what the warm-up writes and what rewards read (docs/rewards.md)."""
    draw_ids: bool = False
    """Draw the numbers of the samples' instances on the frames, where their boxes are (STVG-R1)."""
    think: bool = True
    """Ask for reasoning inside think tags before the answer, and reward the tags."""
    system: str = ""
    """System message; empty: the chat template's own."""


class RolloutConfig(Section):
    engine: Literal["group", "vllm"] = "group"
    """What samples: group (in process, on the model's own weights), vllm (docs/rollout.md; needs the package vllm)."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Responses a prompt (G)."""
    prompts: Positive = 8
    """Prompts a step."""
    max_new_tokens: Positive = 768
    """Longest response, in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature; the loss uses the same one."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling: smallest set of tokens with this probability."""
    top_k: Count = 0
    """Sample among the k likeliest tokens only; 0: all."""
    min_p: Share = 0.0
    """Leave out tokens below this share of the likeliest one's probability; 0: none."""
    stop: tuple[str, ...] = ()
    """A response ends behind the first of these strings, beside the model's own stop token."""
    max_rows: Positive = 256
    """Most responses that are decoded at a time."""
    kv_gb: Annotated[float, Field(ge=0.0)] = 0.0
    """GB (10^9 bytes) for keys and values; prompts wait for room. 0: at most 40 % of free GPU memory, 4 GB on a CPU."""
    cuda_graphs: bool = True
    """Run decode steps as CUDA graphs, one for each of some numbers of rows; they stay valid as the weights change."""
    prefill_chunk: Positive = 8192
    """Prompt tokens in one pass of the prefill."""


class KernelsConfig(Section):
    layers: Literal["auto", "liger", "torch"] = "auto"
    """RMSNorm and SwiGLU: auto (compiled ones on a CPU, else the model's own), liger (on a GPU, the package
    liger-kernel), torch (the model's own)."""


class EmbedCacheConfig(Section):
    gpu_gb: Annotated[float, Field(ge=0.0)] = 1.0
    """GPU memory for a frozen vision tower's embeddings, in GB (10^9 bytes); 0: none."""
    host_gb: Annotated[float, Field(ge=0.0)] = 4.0
    """Host memory for embeddings (page-locked where there is a GPU), in GB; 0: none."""
    disk_gb: Annotated[float, Field(ge=0.0)] = 0.0
    """Size of the folder of embeddings, in GB; 0: none."""
    folder: str = ""
    """Folder on a local disk that keeps embeddings between runs; empty: one in the run folder."""


class VllmConfig(Section):
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Share of the GPU's memory for vLLM's copy of the weights and its cache; the trainer needs the rest."""
    max_model_len: Count = 0
    """Longest prompt and response together, in tokens; 0: the model's context, for which the cache must have room."""
    max_batched_tokens: Count = 0
    """Tokens of one step of vLLM, at least those of the longest video of the native layout; 0: vLLM's choice."""
    enforce_eager: bool = False
    """No torch.compile and no CUDA graphs: starts sooner, decodes slower."""


class ParallelConfig(Section):
    replicas: Positive = 1
    """Processes with the same weights on this machine, each with its share of a step's prompts, and a GPU each where
    there are some. Their number changes rounding alone."""
    sp: Positive = 1
    """Processes that share each sequence of a replica: replicas x sp processes in all. Updates of long videos need
    about 1/sp of the activations; whole groups roll out on one of them each."""
    shard: Positive = 1
    """Of all processes so many share weights, gradients and optimizer states (FSDP2), each with its part; between those
    groups they are copied (HSDP). A multiple of sp that divides replicas x sp; 1: each process has everything."""
    sequence: Literal["gather_kv", "ulysses"] = "gather_kv"
    """How they attend: gather the prompts' keys and values, whatever the heads, or exchange tokens for heads, where sp
    divides the heads. Groups in stages always gather."""
    wait: Annotated[float, Field(gt=0.0)] = 30.0
    """Minutes that a process waits for another: the first may be writing a checkpoint, or decode a long video. Then the
    run ends with VRLT-S04, which names what it waited for."""


class OptimConfig(Section):
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW weight decay (matrices only; norms and biases have none)."""
    warmup: Count = 10
    """Steps of linear warm-up at the start of each stage."""
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest norm of the gradient."""
    states: Literal["float32", "bfloat16"] = "float32"
    """Data type that AdamW's two moments are kept in; bfloat16 ones are rounded stochastically and take half the
    memory. Steps are computed in fp32 on fp32 weights either way."""
    offload: bool = False
    """Keep AdamW's moments and fp32 weights in host memory, and take its steps there: slower, and only for a GPU whose
    memory isn't enough."""


class TrainConfig(Section):
    out: str = "runs/run"
    """Run folder; must not exist, unless --resume."""
    stages: tuple[Literal["sft", "grpo"], ...] = ("sft", "grpo")
    """Stages in order."""
    seed: Count = 0
    """Seed of data order, sampling and initialisation."""
    deterministic: bool = False
    """Bitwise repeatable on the same machine and thread count; slower on a GPU."""
    threads: Count = 0
    """CPU threads of torch; 0: torch's own choice."""
    micro_rows: Positive = 64
    """Most responses (GRPO) or questions (SFT) in one pass, but at least one group; gradients add up over the step."""
    micro_tokens: Count = 0
    """Most tokens of prompts and responses in one GRPO pass, but at least one response; 0: no limit but micro_rows.
    Where memory runs out, the step is done again with half as many, and the run goes on with that."""
    prefix: Literal["shared", "replicated"] = "shared"
    """GRPO's passes: a prompt once for all of its responses, or, to check that, a copy a response, one by one."""
    verify_shared_prefix: Literal["off", "first_step"] = "off"
    """first_step: before the first GRPO update of a run, or of a resumed one, compare log-probs and all gradients of
    two responses with those of replicated rows, and end the run where they differ by more than rounding."""
    probe: Literal["auto", "on", "off"] = "auto"
    """Take the largest GRPO update that the data allow before the first step, without training on it, to find out
    whether it fits and what it needs; auto: on a GPU."""
    recompute: bool = False
    """Activation checkpointing: keep the inputs of layers alone, and compute the layers again in the backward pass."""


class CheckpointConfig(Section):
    every: Count = 50
    """Steps between checkpoints inside a stage; 0: only at the end of a stage. The end of a stage always writes one."""
    keep: Positive = 2
    """Checkpoints inside a stage that are kept; older ones are removed once a newer one is complete."""


class LogConfig(Section):
    to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Writers beside metrics.jsonl and the console, each from a package of its own."""
    project: str = "vrlt"
    """Project name for trackio and wandb."""


class EvalConfig(Section):
    samples: Count = 0
    """Held-out questions to use, spread over the tasks; 0: all."""
    start: bool = True
    """Evaluate before the first stage too."""
    responses: Count = 4
    """Sampled answers a question beside the greedy one."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of the sampled answers."""
    prompts: Positive = 16
    """Prompts in one evaluation batch."""


class Config(Section):
    """The whole tree; the sections are the tables of a TOML file."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    video: VideoConfig = VideoConfig()
    prompt: PromptConfig = PromptConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    kernels: KernelsConfig = KernelsConfig()
    embed_cache: EmbedCacheConfig = EmbedCacheConfig()
    vllm: VllmConfig = VllmConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    scorer: ScorerConfig = ScorerConfig()
    select: SelectConfig = SelectConfig()
    grpo: GrpoConfig = GrpoConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
