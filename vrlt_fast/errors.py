"""Coded errors: what happened, where, why, and the command that mends it.

Every code has a paragraph in docs/troubleshooting.md; a test compares the two sets. The first letter after
``VRLT-`` fixes the exit code of the command line: C and W = 2 (config, rewards), D, V and L = 3 (data, video,
selection), M, R, K and E = 4 (model folder, run folder, checkpoint, environment), S = 75 (stopped, resumable).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CODES: dict[str, str] = {
    "VRLT-C01": "unknown configuration key",
    "VRLT-C02": "configuration value of the wrong type or out of range",
    "VRLT-C03": "configuration file missing or not TOML",
    "VRLT-C04": "configuration values contradict each other",
    "VRLT-C05": "unknown recipe",
    "VRLT-D01": "annotation file missing or empty",
    "VRLT-D02": "malformed JSON",
    "VRLT-D03": "missing field or field of the wrong type",
    "VRLT-D04": "unknown task",
    "VRLT-D05": "span outside the video or start not before end",
    "VRLT-D06": "options empty, or answer not among the options",
    "VRLT-D07": "duplicate id",
    "VRLT-D08": "video path outside the data root",
    "VRLT-D09": "special token inside a text",
    "VRLT-D10": "prompt longer than the model's context",
    "VRLT-D11": "unknown field",
    "VRLT-D12": "too many videos failed",
    "VRLT-D13": "output of a data command exists already",
    "VRLT-D14": "grammar without a form for a sample's right answer",
    "VRLT-D15": "annotation of another format can't be converted",
    "VRLT-V01": "video file missing",
    "VRLT-V02": "video file empty or unreadable",
    "VRLT-V03": "file has no video stream",
    "VRLT-V04": "video has no decodable frames",
    "VRLT-V05": "video ends before the requested frame",
    "VRLT-V06": "frame size can't be patchified",
    "VRLT-V07": "video holds several timelines",
    "VRLT-V08": "video made the decoder hang or crash",
    "VRLT-V09": "video is on the poisoned list",
    "VRLT-V10": "image file holds several pictures",
    "VRLT-M01": "model folder missing or without weights",
    "VRLT-M02": "model family not supported",
    "VRLT-M03": "tokenizer lacks what the prompt needs",
    "VRLT-M04": "weights do not fit the model",
    "VRLT-R01": "run folder exists already",
    "VRLT-R02": "run folder can't be written",
    "VRLT-R03": "no space left while writing the run folder",
    "VRLT-R04": "run folder lacks what a report needs",
    "VRLT-K01": "checkpoint incomplete or damaged",
    "VRLT-K02": "no checkpoint to resume from",
    "VRLT-K03": "resume with another configuration or data set",
    "VRLT-E01": "optional package missing",
    "VRLT-E02": "device not available",
    "VRLT-E03": "needs a source checkout",
    "VRLT-E04": "vLLM doesn't start",
    "VRLT-E05": "out of memory in the update",
    "VRLT-E06": "shared prefix differs from replicated rows",
    "VRLT-E07": "the run doesn't fit into memory",
    "VRLT-W01": "reward function of the user's can't be loaded",
    "VRLT-W02": "judge doesn't work",
    "VRLT-W03": "request to the progress server isn't valid",
    "VRLT-L01": "scores of another model, recipe or data file",
    "VRLT-L02": "file of scores damaged, incomplete or in use",
    "VRLT-L03": "nothing left to pick",
    "VRLT-L04": "sample annotated in part only",
    "VRLT-S01": "loss or gradient not finite",
    "VRLT-S02": "stopped by a signal",
    "VRLT-S03": "logits of a rollout not finite",
    "VRLT-S04": "another process of the run has ended",
}

_EXIT = {"C": 2, "W": 2, "D": 3, "V": 3, "M": 4, "R": 4, "K": 4, "E": 4, "L": 3, "S": 75}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with everything that a user needs to mend it."""

    code: str
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(f"{self.code} is not in vrlt_fast.errors.CODES")

    def __str__(self) -> str:
        head = f"{self.code} {self.where}: {self.what}" if self.where else f"{self.code} {self.what}"
        tail = "".join(f"\n    {name}: {text}" for name, text in (("why", self.why), ("fix", self.fix)) if text)
        return head + tail


class VrltError(Exception):
    """Base of all errors that a user can mend. Carries one or more :class:`Problem`; the first one names the exit
    code.
    """

    def __init__(self, problems: Problem | Sequence[Problem]):
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    @property
    def code(self) -> str:
        return self.problems[0].code

    @property
    def exit_code(self) -> int:
        return _EXIT[self.code[5]]

    def __reduce__(self) -> tuple[type, tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class ConfigError(VrltError):
    """Codes VRLT-Cxx and VRLT-Wxx (rewards), exit 2."""


class DataError(VrltError):
    """Codes VRLT-Dxx, exit 3."""


class VideoError(DataError):
    """Codes VRLT-Vxx, exit 3. In a training run it costs the sample, not the run."""


class SetupError(VrltError):
    """Codes VRLT-Mxx (model), VRLT-Rxx (run folder), VRLT-Kxx (checkpoint), VRLT-Exx (environment), exit 4."""


class Stopped(VrltError):
    """Codes VRLT-Sxx, exit 75: the run stopped but can be resumed."""
