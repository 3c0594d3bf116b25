"""The cells of ``bench/cases/rollout.py``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch

from bench.harness import BenchError, Record, summarize
from bench.rollout_arms import Arm, PerRow, full_forward_logprobs, hf_arm, make_model, make_prompt, our_arm, vllm_arm
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_kernels import group_decode


def cpu_cell(size: str, tokens: int, length: int, group: int, rounds: int, seed: int) -> list[Record]:
    """Tokens a second of all arms for one prompt, and the prefix bytes that decode steps read."""
    with tempfile.TemporaryDirectory() as folder:
        return _cpu_cell(Path(folder), size, tokens, length, group, rounds, seed)


def _cpu_cell(folder: Path, size: str, tokens: int, length: int, group: int, rounds: int, seed: int) -> list[Record]:
    lm = make_model(size, torch.device("cpu"), tokens + length + 512, folder)
    prompt = make_prompt(lm, tokens, seed)
    shape = f"{size}, prompt {short(tokens)}, {length} tokens"
    arms = [our_arm("group engine", lm, [prompt], group, length)]
    arms += [hf_arm(lm, [prompt], group, length, cache) for cache in ("dynamic", "static")]
    if find_spec("vllm"):
        arms.append(vllm_arm(lm, [prompt], group, length))
    _parity(lm, prompt, arms, min(length, 16))
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(rounds):
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            arm.prepare()
            begin = perf_counter()
            found = arm.run(1.0)
            times[arm.name].append(perf_counter() - begin)
            _whole(arm, found, [group], length)
    records = [
        summarize(name, shape, "rate", "tokens/s", [group * length / t for t in spent]) for name, spent in times.items()
    ]
    text = lm.info.config.text_config
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * 4
    token *= text.hidden_size // text.num_attention_heads
    stats = arms[0].stats
    records.append(summarize("group engine", shape, "prefix read", "B", [stats.prefix_tokens_read * token]))
    read = group * (length - 1) * len(prompt) * token
    records += [summarize(arm.name, shape, "prefix read", "B", [read]) for arm in arms[1:]]
    for arm in arms[:3]:
        words = [size, str(tokens), str(length), str(group), arm.name]
        command = [sys.executable, "-m", "bench.rollout_peak", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"peak memory of {arm.name}: {done.stderr.strip().splitlines()[-1]}")
        records.append(summarize(arm.name, shape, "peak memory", "B", [float(done.stdout)]))
    return records


def short(tokens: int) -> str:
    """1024 as 1k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _whole(arm: Arm, found: Sequence[Sequence[Sequence[int]]], rows: Sequence[int], length: int) -> None:
    if [len(group) for group in found] != list(rows) or any(len(row) != length for group in found for row in group):
        raise BenchError(f"{arm.name}: not {rows} rows of {length} tokens")


def _parity(lm: VideoLM, prompt: Prompt, arms: Sequence[Arm], length: int) -> None:
    """Greedy tokens of all arms agree, and the engine's log-probs are those of a full forward pass.

    Raises:
        BenchError: they don't.
    """
    for arm in arms:
        arm.prepare()
    found = {arm.name: arm.run(0.0)[0][0][:length] for arm in arms}
    if len(set(found.values())) != 1:
        raise BenchError(f"greedy tokens differ: {found}")
    groups = arms[0].groups
    completion = groups[0].completions[0]
    gap = float((completion.logprobs - full_forward_logprobs(lm, prompt, completion.tokens)).abs().max())
    if gap > 1e-4:
        raise BenchError(f"log-probs differ from a full forward pass by {gap}")


def gpu_cells(device: torch.device, group: int, seed: int, *, small: bool) -> Iterator[list[Record]]:
    """Attention alone; steps and rates of 7B and 3B shapes with 1, 4 and 8 groups, most important first."""
    sizes = ("demo",) if small else ("7b", "3b")
    tokens, length = (256, 8) if small else (16384, 512)
    yield _attention(device, group, tokens, small=small)
    for size in sizes:
        lm = make_model(size, device, tokens + length + 512)
        prompts = [make_prompt(lm, tokens, seed + i) for i in range(8)]
        for groups in (1, 4) if small else (1, 4, 8):
            yield _steps(lm, size, prompts[:groups], group, length)
        hf = hf_arm(lm, prompts[:1], group, length, "dynamic")
        yield [_rate(hf, size, prompts[:1], group, length, 1)]
        del lm


def _rate(arm: Arm, size: str, prompts: Sequence[Prompt], group: int, length: int, rounds: int) -> Record:
    """Tokens a second of whole calls, the first left out."""
    rates = []
    for _ in range(rounds + 1):
        _sync(prompts)
        begin = perf_counter()
        found = arm.run(1.0)
        _sync(prompts)
        rates.append(len(prompts) * group * length / (perf_counter() - begin))
        _whole(arm, found, [group] * len(prompts), length)
    return summarize(arm.name, _shape(size, prompts), "rate", "tokens/s", rates[1:])


def _sync(_: object) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _shape(size: str, prompts: Sequence[Prompt]) -> str:
    tokens = 1024 * round(len(prompts[0]) / 1024) or len(prompts[0])
    return f"{size}, prompt {short(tokens)}, {len(prompts)} groups"


def _steps(lm: VideoLM, size: str, prompts: Sequence[Prompt], group: int, length: int) -> list[Record]:
    """Both ways to read prefixes: milliseconds a decode step, tokens a second, peak memory; and the floor of a step."""
    records, shape = [], _shape(size, prompts)
    for name, how in (("group engine", {}), ("prefix read per row", {"decoder": PerRow})):
        arm = our_arm(name, lm, prompts, group, length, max_rows=group * len(prompts), kv_gb=64.0, **how)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        records.append(_rate(arm, size, prompts, group, length, 1))
        stats = arm.stats
        records.append(summarize(name, shape, "step", "ms", [1e3 * stats.seconds["generate"] / stats.decode_steps]))
        if torch.cuda.is_available():
            records.append(summarize(name, shape, "peak", "B", [torch.cuda.max_memory_allocated()]))
    text = lm.info.config.text_config
    token = 4 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    weights = sum(p.nbytes for n, p in lm.module.named_parameters() if "visual" not in n and "embed_tokens" not in n)
    read = weights + token * (sum(map(len, prompts)) + len(prompts) * group * length / 2)
    records.append(summarize("group engine", shape, "floor", "ms", [1e3 * read / _bandwidth(lm.device)]))
    return records


def _bandwidth(device: torch.device) -> float:
    """Bytes a second that are read, by a sum over 2 GB."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**24, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(6):
        _sync(x)
        begin = perf_counter()
        x.sum()
        _sync(x)
        times.append(perf_counter() - begin)
    return float(x.nbytes / min(times))


def _attention(device: torch.device, group: int, tokens: int, *, small: bool) -> list[Record]:
    """One layer's attention of a 7B decode step with 4 groups, prefix read once a group and once a row."""
    heads, kv, dim, groups = 28, 4, 128, 4
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    rows, own = groups * group, 256 if not small else 8
    query, key, value = random(rows, heads, dim), random(groups * tokens, kv, dim), random(groups * tokens, kv, dim)
    own_key, own_value = random(rows, own, kv, dim), random(rows, own, kv, dim)
    start = torch.arange(groups, device=device) * tokens
    length = torch.full((groups,), tokens, device=device)
    per_row = torch.arange(rows, device=device)

    def run(shared: bool) -> torch.Tensor:
        each, ends = per_row // group, torch.arange(groups + 1, device=device) * group
        return group_decode(
            query,
            key,
            value,
            own_key,
            own_value,
            prefix_start=start if shared else start[each],
            prefix_length=length if shared else length[each],
            row_offsets=ends if shared else torch.arange(rows + 1, device=device),
            slots=per_row,
            suffix_length=torch.full((rows,), own, device=device),
            max_prefix=tokens,
            max_group=group if shared else 1,
        )

    torch.testing.assert_close(run(True), run(False), atol=2e-2, rtol=2e-2)
    shape = f"7b heads, prompt {short(tokens)}, {groups} groups"
    records = []
    for name, shared in (("group_decode", True), ("per row", False)):
        times = [_time(partial(run, shared), device) for _ in range(20)]
        records.append(summarize(name, shape, "attention", "ms", [statistics.median(times)]))
    return records


def _time(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds; on CUDA by events, with the host ahead."""
    if device.type != "cuda":
        begin = perf_counter()
        step()
        return 1e3 * (perf_counter() - begin)
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(4_000_000)  # type: ignore[no-untyped-call]
    begin_event.record()
    step()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event))
