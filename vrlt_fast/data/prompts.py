"""What a model is asked and what the right answer looks like, per task, in the words of the grammar. Text only; the
video's place is left to the chat template.
"""

from __future__ import annotations

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.sample import LETTERS, Sample


def user_text(sample: Sample, prompt: PromptConfig) -> str:
    """The user's text for a sample: question, options, and how to reply.

    Raises DataError D14 where the grammar has no form for the sample's answer.
    """
    lines = [sample.question]
    lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, sample.options, strict=False)]
    lines.append(grammar(prompt.grammar).ask(sample, think=prompt.think))
    return "\n".join(lines)


def messages(sample: Sample, prompt: PromptConfig, *, images: int = 0, video: bool = True) -> list[dict[str, object]]:
    """Chat messages with so many images, then the video, then the text. Raises as :func:`user_text`."""
    content = [{"type": "image"}] * images + [{"type": "video"}] * video
    content.append({"type": "text", "text": user_text(sample, prompt)})
    user: dict[str, object] = {"role": "user", "content": content}
    return [{"role": "system", "content": prompt.system}, user] if prompt.system else [user]


def answer_text(sample: Sample, prompt: PromptConfig) -> str:
    """The response that earns every part of the reward, for the supervised warm-up. Raises as :func:`user_text`."""
    return grammar(prompt.grammar).write(sample, think=prompt.think)
