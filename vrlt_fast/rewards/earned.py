"""What responses earn by the rules of a configuration, its judge or scorer, and the user's own functions, in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch

from vrlt_fast.config import Config
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.sample import TASKS, Sample
from vrlt_fast.rewards.base import Parts, Response
from vrlt_fast.rewards.dual import make_reward, weights
from vrlt_fast.rewards.judge import Asked, Judge
from vrlt_fast.rewards.scorer import Scorer
from vrlt_fast.rewards.user import UserRewards


class Earned:
    """Scores responses, those to one sample at a time, each for itself. Close it when done.

    Args:
        device: of a scorer model.
        warn: takes a line about rewards that failed.
        tasks: what is asked; packages that only other tasks need aren't loaded.

    ``weights`` are those of all parts, also of those that a group decides.

    Raises:
        VrltError: E01 a package is missing, C04, W01, W02 or M codes for what a judge, scorer or own reward needs.
    """

    def __init__(
        self, config: Config, *, device: torch.device, warn: Callable[[str], None], tasks: Collection[str] = TASKS
    ):
        reward, graded = config.reward, "open" in tasks
        self._prompt = config.prompt
        self._judge = Judge(config.judge, warn=warn) if graded and reward.open == "judge" else None
        self._scorer = Scorer(config.scorer, device, warn=warn) if graded and reward.open == "scorer" else None
        self._grades: dict[str, float] = {}
        own = self._grade if self._judge or self._scorer else None
        self._reward = make_reward(reward, config.prompt, tasks=tasks, open_answer=own)
        self._user = UserRewards(reward.user, reward.user_weights, reward.timeout, warn) if reward.user else None
        self.weights = weights(reward)

    def __enter__(self) -> Earned:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, responses: Sequence[Response], sample: Sample, *, own: bool = True) -> list[Parts]:
        """The parts that each response earns, the user's ``own`` among them or not."""
        self._grade_together(responses, sample)
        parts = [self._reward(response, sample) for response in responses]
        if self._user is not None and own:
            more = self._user.score(responses, [sample] * len(parts))
            parts = [one | own for one, own in zip(parts, more, strict=True)]
        return parts

    @property
    def counts(self) -> Counter[str]:
        """Responses that earned 0 without being scored, since the start, by what failed and how."""
        parts = {"judge": self._judge, "scorer": self._scorer, "user": self._user}
        found = ((f"{name} {kind}", n) for name, one in parts.items() if one for kind, n in one.counts.items())
        return Counter({name: n for name, n in found if n})

    def check(self) -> None:
        """Import own rewards, and ask the judge one question. Raises ConfigError W01 or W02."""
        for one in (self._user, self._judge):
            if one is not None:
                one.check()

    def close(self) -> None:
        """End threads and processes."""
        for one in (self._user, self._judge):
            if one is not None:
                one.close()

    def _grade_together(self, responses: Sequence[Response], sample: Sample) -> None:
        """Have the answers to a question graded at once, equal ones once."""
        self._grades = {}
        if sample.task != "open" or not (self._judge or self._scorer):
            return
        read = grammar(self._prompt.grammar).read
        said = dict.fromkeys(read(r.text, sample, think=self._prompt.think).answer or "" for r in responses)
        answers, found = [answer for answer in said if answer], list[float]()
        if self._judge is not None:
            found = self._judge.score([Asked(sample.question, sample.answer, answer) for answer in answers])
        elif self._scorer is not None:
            found = self._scorer.score([(sample.answer, answer) for answer in answers])
        self._grades = dict(zip(answers, found, strict=True))

    def _grade(self, answer: str, sample: Sample) -> float:
        return self._grades[answer]
