"""What the progress server asks a model, and how: questions, prompts, batches, answers."""

from __future__ import annotations

import base64
import binascii
import json
import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from vrlt_fast.config import Config
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import DataError, Problem
from vrlt_fast.model.load import inspect_model, load_model
from vrlt_fast.model.prompt import Prompt, encode_prompt, render
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.video.images import ImageLoader

MOST_IMAGES = 16
LONGEST_TASK = 4000
"""Characters."""
_KEYS = ("task", "images", "previous")
_WAITING = 32
_BATCH = 8
_END_S = 10.0
_FIX = 'send {"task": "put the cup on the plate", "images": ["base64 of a PNG or JPEG file"], "previous": 0.4}'


@dataclass(frozen=True)
class Question:
    """What is asked: a task in words, pictures from its start to now as PNG or JPEG files, and the progress (0..1) that
    was said of the picture before, where there is one.
    """

    task: str
    images: tuple[bytes, ...]
    previous: float | None = None

    @property
    def text(self) -> str:
        one = len(self.images) == 1
        shown = (
            "The image shows the scene now." if one else "The images show the scene from the start, the last one now."
        )
        before = "" if self.previous is None else f" Before, {100 * self.previous:.0f} % of it was done."
        return f"{shown} Task: {self.task}{before}\nHow much of the task is done now, in percent?"


@dataclass(frozen=True)
class Answer:
    """``progress`` in 0..1, None where the ``text`` that the model wrote doesn't say it."""

    progress: float | None
    text: str


class ProgressModel:
    """A model folder that answers, greedily, in the grammar of ``prompt.grammar``.

    Raises:
        VrltError: as :func:`~vrlt_fast.model.load.load_model`; D14 where the grammar has no form for progress, M03
            where the chat template has no place for images.
    """

    def __init__(self, config: Config):
        self.config = config
        self.lm = load_model(config.model, inspect_model(config.model.name), config.kernels.layers)
        self.engine = GroupEngine(self.lm, config.rollout)
        self.images = ImageLoader(config.video, self.lm.info.geometry)
        self.grammar = grammar(config.prompt.grammar)
        self._tokenizer = threading.Lock()
        render(self.lm.info, _sample("?"), config.prompt, images=1, video=False)

    def prompt(self, question: Question) -> Prompt:
        """The prompt of a question. Safe to use from several threads.

        Raises:
            DataError: W03 when it is too long, and the image loader's V codes for images, named "images[0]".
        """
        clips = [self.images.load_bytes(data, f"images[{i}]") for i, data in enumerate(question.images)]
        reserve = self.config.rollout.max_new_tokens
        try:
            with self._tokenizer:
                sample = _sample(question.text)
                return encode_prompt(self.lm.info, sample, None, self.config.prompt, images=clips, reserve=reserve)
        except DataError as error:
            raise _invalid(error.problems[0].what, "send fewer or smaller images") from None

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer | Exception]:
        """An answer for each, from one rollout; where that fails, from one each, so that a prompt costs itself only."""
        try:
            return list(self._generate(prompts))
        except Exception as error:
            if len(prompts) == 1:
                return [error]
            return [self.answer([prompt])[0] for prompt in prompts]

    def _generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        sampling = Sampling(self.config.rollout.max_new_tokens, 0.0, stop=self.config.rollout.stop)
        requests = [RolloutRequest(prompt, 1, sampling, seed=0) for prompt in prompts]
        groups, _ = self.engine.generate(requests)
        return [self.read(group.completions[0].response.text) for group in groups]

    def read(self, text: str) -> Answer:
        """What a response says."""
        found = self.grammar.read(text, _sample("?"), think=self.config.prompt.think)
        return Answer(found.progress, text)


def _sample(question: str) -> Sample:
    return Sample("request", "", 0.0, "progress", question)


def _invalid(what: str, fix: str = _FIX) -> DataError:
    return DataError(Problem("VRLT-W03", what, "request", fix=fix))


def question_of(body: bytes) -> Question:
    """The question that a request's body asks: a JSON object with ``task``, ``images`` and maybe ``previous``.

    Raises:
        DataError: W03.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise _invalid("the body isn't JSON") from None
    if not isinstance(fields, dict):
        raise _invalid("the body isn't a JSON object")
    if unknown := sorted(set(fields) - set(_KEYS)):
        raise _invalid(f"{unknown[0][:40]!a} is none of {', '.join(_KEYS)}")
    task, images, previous = fields.get("task"), fields.get("images"), fields.get("previous")
    if not isinstance(task, str) or not task.strip() or len(task) > LONGEST_TASK:
        raise _invalid(f"task isn't a text of 1 to {LONGEST_TASK} characters")
    if "<|" in task or not task.isprintable():
        raise _invalid("task has a control token or an unprintable character")
    if not isinstance(images, list) or not 1 <= len(images) <= MOST_IMAGES:
        raise _invalid(f"images isn't a list of 1 to {MOST_IMAGES} images")
    number = isinstance(previous, int | float) and not isinstance(previous, bool)
    if previous is not None and not (number and math.isfinite(previous) and 0 <= previous <= 1):
        raise _invalid("previous isn't a number from 0 to 1")
    return Question(task, tuple(_bytes_of(image, i) for i, image in enumerate(images)), previous)


def _bytes_of(image: object, place: int) -> bytes:
    if not isinstance(image, str):
        raise _invalid(f"images[{place}] isn't a text")
    try:
        return base64.b64decode(image.rpartition(";base64,")[2], validate=True)
    except (binascii.Error, ValueError):
        raise _invalid(f"images[{place}] isn't base64") from None


class Batches:
    """Collects prompts while the model is busy, and hands it up to 8 at a time. At most 32 wait."""

    def __init__(self, answer: Callable[[Sequence[Prompt]], Sequence[Answer | Exception]]):
        self._answer = answer
        self._waiting: queue.Queue[tuple[Prompt, Future[Answer]] | None] = queue.Queue(_WAITING)
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def ask(self, prompt: Prompt, timeout: float) -> Answer:
        """Wait for the answer to a prompt. Raises what the model raised, and:

        Raises:
            TimeoutError: it doesn't come in time; where nothing has begun, nothing will.
            queue.Full: too many wait, or the server ends.
        """
        future: Future[Answer] = Future()
        with self._lock:
            if self._closed:
                raise queue.Full
            self._waiting.put_nowait((prompt, future))
        try:
            return future.result(timeout)
        finally:
            future.cancel()

    def close(self) -> None:
        """Let what has begun end, and refuse the rest."""
        with self._lock:
            self._closed = True
            with suppress(queue.Full):  # then nobody waits for something to do
                self._waiting.put_nowait(None)
        self._thread.join(_END_S)

    def _take(self, first: bool) -> list[tuple[Prompt, Future[Answer]]]:
        """Those that wait, 8 at most, and that somebody still waits for; ``first``: wait for one."""
        found = [self._waiting.get()] if first else []
        with suppress(queue.Empty):
            while len(found) < _BATCH:
                found.append(self._waiting.get_nowait())
        return [one for one in found if one is not None and one[1].set_running_or_notify_cancel()]

    def _run(self) -> None:
        while not self._closed:
            batch = self._take(first=True)
            answers = self._answer([prompt for prompt, _ in batch]) if batch and not self._closed else ()
            for (_, future), found in zip(batch, answers or [queue.Full()] * len(batch), strict=True):
                future.set_exception(found) if isinstance(found, Exception) else future.set_result(found)
        while not self._waiting.empty():
            for _, future in self._take(first=False):
                future.set_exception(queue.Full())
