"""What a model is asked and what the right answer looks like, per task. Text only; the video's place is left to the
chat template.
"""

from __future__ import annotations

from collections.abc import Sequence

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.sample import LETTERS, Sample, Span

_THINK = "Think step by step between <think> and </think> first. "
_ASK = {
    "videoqa": "Reply with the letter: <answer>letter</answer>",
    "grounding": "Reply with the time span in seconds: <answer>start to end</answer>",
    "grounded_qa": (
        "Reply with the letter and the time spans in seconds: <answer>letter</answer><glue>[(start, end)]</glue>"
    ),
}


def user_text(sample: Sample, prompt: PromptConfig) -> str:
    """The user's text for a sample: question, options, and how to reply."""
    lines = [sample.question]
    lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, sample.options, strict=False)]
    lines.append((_THINK if prompt.think else "") + _ASK[sample.task])
    return "\n".join(lines)


def messages(sample: Sample, prompt: PromptConfig, *, images: int = 0, video: bool = True) -> list[dict[str, object]]:
    """Chat messages with so many images, then the video, then the text."""
    content = [{"type": "image"}] * images + [{"type": "video"}] * video
    content.append({"type": "text", "text": user_text(sample, prompt)})
    user: dict[str, object] = {"role": "user", "content": content}
    return [{"role": "system", "content": prompt.system}, user] if prompt.system else [user]


def _seconds(value: float) -> str:
    return f"{value:.1f}"


def _borders(start: float, end: float) -> tuple[str, str]:
    """Start and end with one decimal, or with as many as keep a short span from becoming empty."""
    for digits in range(1, 6):
        if f"{start:.{digits}f}" != f"{end:.{digits}f}":
            return f"{start:.{digits}f}", f"{end:.{digits}f}"
    return f"{start:.6f}", f"{end:.6f}"


def answer_text(sample: Sample, prompt: PromptConfig) -> str:
    """The response that earns every part of the reward, for the supervised warm-up."""
    spans: Sequence[Span] = sample.spans
    if sample.task == "grounding":
        answer = f"<answer>{' to '.join(_borders(spans[0][0], spans[-1][1]))}</answer>"
    elif sample.task == "videoqa":
        answer = f"<answer>{sample.answer}</answer>"
    else:
        glue = ", ".join(f"({', '.join(_borders(s, e))})" for s, e in spans)
        answer = f"<answer>{sample.answer}</answer><glue>[{glue}]</glue>"
    return f"<think>{_thought(sample)}</think>\n{answer}" if prompt.think else answer


def _thought(sample: Sample) -> str:
    if sample.reasoning:
        return sample.reasoning
    parts = [sample.options[LETTERS.index(sample.answer)]] if sample.wants_answer else []
    parts += [f"from {_seconds(s)} to {_seconds(e)} seconds" for s, e in sample.spans] if sample.wants_spans else []
    return ", ".join(parts)
