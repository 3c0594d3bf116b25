"""The sections of the configuration that are about learning: warm-up, rewards, the loss, selection."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vrlt_fast.config_base import Count, Positive, Section, Share, Weight


class SftConfig(Section):
    steps: Count = 0
    """Optimizer steps of supervised warm-up on the training set's own answers."""
    batch: Positive = 8
    """Videos a step; all questions about a video go together and share its tokens."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    """Peak learning rate; linear warm-up, then cosine to 10 %."""
    narration: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of a second loss: captions behind each frame pair, from the samples' timeline (interleaved layout only).
    """
    reasoned: bool = False
    """Train on the samples with a reasoning alone."""
    think_share: Share = 0.0
    """Share of the questions with a reasoning that the warm-up asks with thinking though prompt.think is off."""


class RewardConfig(Section):
    semantic: Weight = 1.0
    """Weight of the discrete part: the option, number or text is right."""
    temporal: Weight = 1.0
    """Weight of the continuous part: how well the predicted spans fit the annotated ones."""
    format: Weight = 0.5
    """Weight of the format part: the response follows the grammar of its task exactly."""
    spatial: Weight = 1.0
    """Weight of the mean IoU of predicted with annotated boxes (task boxes)."""
    instance: Weight = 1.0
    """Weight of naming the right object (task instance)."""
    progress: Weight = 1.0
    """Weight of 1 - |error| of the predicted progress (task progress)."""
    choice: Literal["exact", "soft"] = "exact"
    """Of options: all right ones and no other (exact), or part of the right ones counts in part (soft, TW-GRPO)."""
    overlap: Literal["tiou", "merged", "hull", "boundary", "iop"] = "tiou"
    """Of spans: IoU of the merged sets, the same but 0 where a span is the wrong way round (VideoChat-R1), IoU of first
    spans over their hull (Temporal-R1's code), IoU times closeness of both borders (Time-R1), or the part of the
    prediction that is inside."""
    open: Literal["rouge", "judge", "scorer"] = "rouge"
    """Of answers in own words: mean of ROUGE-1, -2 and -L, a judge over HTTP, or a small model in process."""
    shuffled: Weight = 0.0
    """T-GRPO: bonus for right answers where the group is better than one that sees the frames in random order; 0: there
    is no such group."""
    shuffled_ratio: Annotated[float, Field(ge=0.0)] = 0.8
    """T-GRPO: the bonus is paid where the group's mean is at least this times that of the shuffled one."""
    length: Weight = 0.0
    """Bonus for right answers of a length in length_range, where the group has more than one (Video-R1)."""
    length_range: tuple[int, int] = (320, 512)
    """Tokens, stop token included, of responses that get the length bonus."""
    earned: Share = 0.1
    """A response counts as right, for the bonuses, where its semantic part (else its temporal one) is above this."""
    overlong: Weight = 0.0
    """Weight of DAPO's penalty for long responses: 0 to -1 over the last overlong_buffer tokens, -1 when cut off."""
    overlong_buffer: Positive = 128
    """Tokens before max_new_tokens over which the penalty grows."""
    user: tuple[str, ...] = ()
    """Your own rewards, as "module:function": called with a response and its sample, in a process that may crash or
    hang (docs/rewards.md)."""
    user_weights: tuple[float, ...] = ()
    """Their weights; empty: 1 each."""
    timeout: Annotated[float, Field(gt=0.0)] = 10.0
    """Seconds that a reward of your own may take for a response; then its process is killed and it earns 0."""
    shuffle: bool = False
    """Control experiment: hand each response the reward of another response of its group, at random."""

    @model_validator(mode="after")
    def _fit(self) -> RewardConfig:
        if self.user_weights and len(self.user_weights) != len(self.user):
            raise ValueError(f"{len(self.user_weights)} user_weights for {len(self.user)} rewards in user")
        if self.length_range[0] > self.length_range[1]:
            raise ValueError(f"length_range {list(self.length_range)} ends before it starts")
        return self


class JudgeConfig(Section):
    url: str = ""
    """Base of an OpenAI-compatible server, like http://localhost:8000/v1, for reward.open = "judge"."""
    model: str = ""
    """Name of the model there."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written down."""
    parallel: Positive = 16
    """Requests at a time."""
    timeout: Annotated[float, Field(gt=0.0)] = 30.0
    """Seconds for one request."""
    retries: Count = 2
    """Further tries of a request that failed."""
    breaker: Positive = 5
    """Failures in a row after which no request is made for some time."""


class ScorerConfig(Section):
    model: str = ""
    """Folder of an HF sequence classifier (safetensors), for reward.open = "scorer"."""
    max_length: Positive = 512
    """Tokens of a pair of reference and answer that it reads."""


class GrpoConfig(Section):
    steps: Count = 1000
    """Optimizer steps of GRPO."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    """Peak learning rate, after a linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: the peak, or cosine to 10 % of it at the last step."""
    beta: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of the k3 KL against the policy at the start of the stage; 0: no reference is kept."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0.0)] = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    updates: Positive = 1
    """Optimizer steps a rollout (mu); above 1 the rollout's policy is scored once as the old one."""
    policy: Literal["clip", "cispo", "sapo", "gspo", "gspo_token", "luspo", "gmpo", "reinforce", "reg"] = "clip"
    """The policy's term of the loss (docs/kernels.md): GRPO's clipped ratio, or another; reg: Reg-GRPO."""
    delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Dual clip: ratios of negative advantages count up to this, above 1 + clip_high; 0: no such bound."""
    reg_eps: Annotated[float, Field(gt=0.0)] = 1e-2
    """Reg-GRPO: added to the deviation of the group's log-ratios, which is 0 at the first update of a rollout."""
    kl: Literal["k3", "k1", "k2", "abs", "k1+", "k3+"] = "k3"
    """Estimator of the KL against the reference."""
    kl_clamp: Annotated[float, Field(gt=0.0)] = 10.0
    """The log-ratio of the KL is clamped to +- this, so that one token can't outweigh the step."""
    entropy: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of an entropy bonus."""
    correction: Literal["none", "tis", "mis", "icepop", "reject"] = "none"
    """Weights for what the rollout engine's log-probs differ from the trainer's by: truncated or masked importance
    sampling, IcePop, or leaving tokens out."""
    correction_level: Literal["token", "sequence", "geometric"] = "token"
    """Whether that is of each token, or of the response."""
    correction_low: Annotated[float, Field(ge=0.0)] = 0.0
    """Least ratio that mis, icepop and reject accept."""
    correction_high: Annotated[float, Field(gt=0.0)] = 2.0
    """Largest ratio."""
    token_weight: Annotated[float, Field(ge=1.0)] = 1.0
    """TW-GRPO's alpha: tokens where the group's responses disagree weigh up to this; 1: all weigh the same."""
    scale: Literal["std", "none", "batch", "rloo", "opo", "pass@k", "gpg", "reinforce++", "reinforce++_baseline"] = (
        "std"
    )
    """How rewards become advantages (docs/kernels.md): divided by the group's standard deviation (GRPO), centred alone
    (Dr.GRPO), or another estimator."""
    scale_eps: Annotated[float, Field(gt=0.0)] = 1e-4
    """Added to the standard deviation."""
    reduction: Literal["token", "sequence", "constant"] = "token"
    """Mean over all response tokens of the step, over tokens of each response and then over responses, or a sum of
    tokens over responses times max_new_tokens (Dr.GRPO)."""
    refill: Count = 0
    """Dynamic sampling: at most so many further rollouts a step, of the next prompts, until rollout.prompts groups have
    unequal rewards; groups with equal ones leave. 0: the step has the groups that it has."""
    truncated: Literal["keep", "drop"] = "keep"
    """Responses that reached max_new_tokens: trained like others, or left out of the loss (DAPO's over-long filter)."""


class SelectConfig(Section):
    repeats: Annotated[int, Field(ge=2)] = 8
    """Responses a sample that `vrlt select score` draws (k)."""
    first: Count = 0
    """Draw so many first, and the rest only where the sample's class isn't clear then; 0: all at once."""
    error: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    """Chance of a wrong class at which it counts as clear."""
    replay: Count = 0
    """Groups with signal that are kept, to stand in for groups without in later steps; 0: none."""
    weighted: bool = False
    """Draw samples by the running deviation of their rewards in this run, rather than evenly."""
    solved: Share = 0.0
    """Leave samples out whose mean reward reached this share of the highest possible, after each epoch; 0: none."""
    mask_outside: Share = 0.0
    """VideoTG-R1: share of the video outside the annotated span that is grey for hard samples at the first step."""
    mask_steps: Count = 0
    """Steps over which that falls to nothing."""
    frames_first: Count = 0
    """VST: most frames of a video at the first step of GRPO; 0: video.max_frames at all steps."""
    frames_steps: Count = 0
    """Steps over which that rises to video.max_frames."""
    frames_by: Positive = 20
    """Frames by which it rises at a time."""
    hint: Share = 0.0
    """DeepVideo-R1: share of a right reasoning given as a hint to samples as hard as can be."""
    noise: Annotated[float, Field(ge=0.0)] = 0.0
    """DeepVideo-R1: deviation of the noise on frames (in levels of 255) of samples as easy as can be."""
    window: Positive = 100
    """DeepVideo-R1: samples over which the mean reward is taken that says what is hard."""

    @model_validator(mode="after")
    def _waves(self) -> SelectConfig:
        if self.first == 1 or self.first >= self.repeats:
            raise ValueError(f"first is {self.first} of {self.repeats} repeats: 0 (all at once), or 2 to repeats - 1")
        return self
