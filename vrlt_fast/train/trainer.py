"""The loop: SFT warm-up, GRPO with the dual reward, checkpoints, evaluation, report."""

from __future__ import annotations

import io
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vrlt_fast.config import Config
from vrlt_fast.config_load import dump_toml
from vrlt_fast.data.splits import data_root
from vrlt_fast.errors import Problem, SetupError, Stopped
from vrlt_fast.evals.run import evaluate
from vrlt_fast.files import write_lines
from vrlt_fast.model.embed_cache import from_config
from vrlt_fast.model.load import VideoLM, enable_recompute, load_model, pick_device
from vrlt_fast.model.lora import AdapterReference, adapter_tensors, add_lora, load_adapters, saved_adapters
from vrlt_fast.model.sharded import ShardedLM, ShardedPolicy
from vrlt_fast.model.vision import is_frozen
from vrlt_fast.parallel.mesh import Mesh, join, leave
from vrlt_fast.parallel.replicas import is_loss, lost
from vrlt_fast.report.console import Console
from vrlt_fast.report.html import write_report
from vrlt_fast.report.metrics import RunLog, read_jsonl_tolerant, truncate_after
from vrlt_fast.train.checkpoint import (
    checkpoint_name,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    load_rng_tensors,
    load_shards,
    load_weights_into,
    optimizer_tensors,
    prune,
    rng_tensors,
    save_checkpoint,
)
from vrlt_fast.train.feed import Feed
from vrlt_fast.train.fit import fit_of
from vrlt_fast.train.guard import Guard
from vrlt_fast.train.manifest import verify
from vrlt_fast.train.optim import MasterAdamW, make_optimizer
from vrlt_fast.train.probe import wanted
from vrlt_fast.train.process import peak_gb, signals, threads_and_determinism
from vrlt_fast.train.setup import (
    Inputs,
    create_run_folder,
    describe,
    lock_run_folder,
    open_run_folder,
    read_inputs,
    refuse_existing,
    with_absolute_paths,
)
from vrlt_fast.train.stages import GrpoStage, SftStage, Stage
from vrlt_fast.video.source import ClipSource


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> Path:
    """Run all stages and return the run folder.

    Raises:
        VrltError: what is wrong with the inputs, before the run folder exists; S02 when a signal stopped the run
        after a
            checkpoint; other codes as they happen. Everything but C, D01-D11, M and R01 can go on with ``resume=True``.
    """
    config = with_absolute_paths(config)
    threads_and_determinism(config)
    mesh = join(pick_device(config.model.device), config.parallel)
    try:
        run_dir = _train(config, mesh, console or _console(mesh), resume=resume)
    except RuntimeError as error:
        if mesh.everyone.world > 1 and is_loss(error):
            raise lost(error, "weights or their gradients") from error
        raise
    leave()
    return run_dir


def _console(mesh: Mesh) -> Console:
    """The first process prints; the others warn only."""
    return Console() if mesh.first else Console(io.StringIO())


def _train(config: Config, mesh: Mesh, console: Console, *, resume: bool) -> Path:
    inputs = read_inputs(config, open_videos=mesh.first)
    for problem in inputs.broken:
        console.warn(f"will be left out: {problem}")
    torch.manual_seed(config.train.seed)
    # before there is a run folder: weights that don't fit leave none
    lm = load_model(config.model, inputs.info, config.kernels.layers)
    if config.lora.rank:
        add_lora(lm, config.lora)
    if mesh.weights is not None:
        lm = ShardedPolicy(lm, mesh.weights)
    run_dir = Path(config.train.out)
    with ExitStack() as stack:
        if mesh.first:
            run_dir = open_run_folder(config) if resume else create_run_folder(config)
            stack.enter_context(lock_run_folder(run_dir))
        mesh.everyone.wait()
        trainer = Trainer(config, inputs, lm, run_dir, console, mesh)
        stack.enter_context(trainer.clips)
        if trainer.embeds is not None:
            stack.enter_context(trainer.embeds)
        if resume:
            trainer.restore()
        if mesh.first:
            stack.enter_context(trainer.start_log())
        stack.enter_context(signals(trainer.stop))
        trainer.run()
    if mesh.first:
        console.message(f"report: {write_report(run_dir)}")
    return run_dir


def dry_run(config: Config) -> str:
    """The resolved configuration and what would be trained. Checks what :func:`train` checks but for the weights'
    shapes, writes nothing.
    """
    inputs = read_inputs(config)
    refuse_existing(Path(config.train.out))
    return dump_toml(config) + "\n" + describe(config, inputs, fit_of(config, inputs).line)


class Trainer:
    """State of one run: the model, the reference, the data order, the logs."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        lm: VideoLM,
        run_dir: Path,
        console: Console,
        mesh: Mesh | None = None,
    ):
        self.mesh = mesh or Mesh()
        self.config, self.inputs, self.lm, self.run_dir, self.console = config, inputs, lm, run_dir, console
        part = (self.mesh.peers.rank, self.mesh.peers.size)
        where: dict[str, Any] = {"folder": run_dir, "device": lm.device, "part": part}
        self.clips = ClipSource(config.video, inputs.info.geometry, warn=console.warn, **where)
        root = data_root(config, "train")
        members: dict[str, Any] = {"replicas": self.mesh.replicas, "peers": self.mesh.peers}
        self.feed = Feed(inputs.info, inputs.train, self.clips, config, root=root, warn=console.warn, **members)
        if config.train.recompute:
            enable_recompute(lm)
        self.embeds = from_config(config, lm, run_dir, console.warn) if is_frozen(lm) else None
        replicas = self.mesh.replicas
        of = f"-{replicas.rank}" if replicas.world > 1 else ""
        self.guard = Guard(run_dir / "bad_steps", console.warn, of, writes=self.mesh.peers.rank == 0)
        self._log: RunLog | None = None
        self._resume_from: dict[str, Any] | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._latest: Path | None = None
        self._evaluated: set[str] = set()
        self._stop_signal: str | None = None

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def log(self) -> RunLog:
        if self._log is None:
            raise RuntimeError("start_log comes first")
        return self._log

    def start_log(self) -> RunLog:
        """Open the logs of the run folder."""
        self._log = RunLog(self.run_dir, self.config.log.to, self.config.log.project)
        return self._log

    def stop(self, name: str) -> None:
        """Ask for a checkpoint and an end after the current step."""
        self._stop_signal = name
        self.console.warn(f"{name}: stopping after this step, with a checkpoint")

    def restore(self) -> None:
        """Go back to the newest checkpoint, and cut the logs back to it. Without one the run starts over."""
        stages = self.config.train.stages
        if not self.mesh.first:
            self.mesh.everyone.wait()  # the first process clears away what an interrupted save left
        latest = latest_checkpoint(self.checkpoints, stages)
        if self.mesh.first:
            self.mesh.everyone.wait()
        if latest is None:
            self._cut_logs(stages[0], 0)
            self.console.message(f"no checkpoint in {self.checkpoints} yet: starting from the first step")
            return
        whole = not isinstance(self.lm, ShardedPolicy)
        if not whole:
            self.mesh.first_alone(partial(verify, latest))
        loaded = load_checkpoint(latest, verified=not whole, wanted=lambda name: whole or name.startswith("rng/"))
        if loaded.state["data"] != self.inputs.fingerprint:
            raise SetupError(
                Problem(
                    "VRLT-K03", "the training file isn't the run's", self.config.data.train, "its bytes have changed"
                )
            )
        load_weights_into(latest, self.lm.whole.module, verified=True)
        load_adapters(self.lm.module, loaded.tensors)
        # Also where the checkpoint ends a stage: the next one goes on with the counts and the random state.
        counted, replicas = loaded.state["feed"], self.mesh.replicas
        rank = replicas.rank
        gone = counted[replicas.world :] if replicas.first else []  # processes that there aren't any more
        self.feed.load(*gone, *counted[rank : rank + 1])
        self.guard.in_a_row = int(loaded.state.get("bad_steps", 0))
        load_rng_tensors(loaded.tensors)
        self._resume_from, self._tensors, self._latest = loaded.state, loaded.tensors, latest
        self._cut_logs(loaded.state["stage"], loaded.state["step"])
        self.console.message(f"resuming from {latest}")

    def _cut_logs(self, stage: str, step: int) -> None:
        stages, first = self.config.train.stages, self.mesh.first
        done = truncate_after(self.run_dir, stages, stage, step) if first else set()
        self._evaluated = self.mesh.everyone.gather(done)[0]

    def run(self) -> None:
        """All stages that are left, each followed by an evaluation."""
        stages = self.config.train.stages
        done = -1
        if self._resume_from is not None:
            done = stages.index(self._resume_from["stage"]) - (0 if self._resume_from["final"] else 1)
        elif self.config.eval.start:
            self._evaluate("start", stages[0], 0)
        for number, name in enumerate(stages):
            if number > done:
                self._run_stage(name)
            if self.steps(name):
                self._evaluate(name, name, self.steps(name))

    def steps(self, stage: str) -> int:
        return self.config.sft.steps if stage == "sft" else self.config.grpo.steps

    def _run_stage(self, name: str) -> None:
        steps = self.steps(name)
        resumed = self._resume_from if self._resume_from and self._resume_from["stage"] == name else None
        stage = self._make_stage(name)
        first = 1
        if resumed is not None:
            first = resumed["step"] + 1
            stage.stream.load(resumed["stream"])
            if known := resumed.get("stage_state"):
                stage.load(known)
            states = self._tensors
            if isinstance(self.lm, ShardedPolicy) and self._latest is not None:
                states = load_shards(self._latest, stage.optimizer)
            load_optimizer_tensors(stage.optimizer, stage.optimizer.masters, states)
            stage.optimizer.load_copies(states)
            load_rng_tensors(self._tensors)
        self._resume_from, self._tensors = None, {}
        with self.console.progress(name, steps, plain=False) as advance:
            advance(first - 1)
            for step in range(first, steps + 1):
                record = stage.step(step)
                failed, peak = self.mesh.replicas.gather(self.feed.failed), self.mesh.everyone.gather(peak_gb())
                record |= {"failed_videos": sum(failed), "peak_gb": max(peak)}
                if self.mesh.first:
                    self.log.train(record)
                self.console.step(record)
                advance(1)
                self._after_step(stage, name, step)
        if not steps:
            self._save(stage, name, 0, final=True)
        stage.close()

    def _make_stage(self, name: str) -> Stage:
        config = self.config
        seed = config.train.seed * 2 + config.train.stages.index(name)
        more: dict[str, Any] = {"guard": self.guard, "cache": self.embeds, "mesh": self.mesh}
        if isinstance(self.lm, ShardedPolicy):
            self.lm.restart()
        if name == "sft":
            optimizer = make_optimizer(self.lm, config.optim, config.sft.lr, seed)
            stream = self.feed.videos(config.sft.batch, seed)
            return SftStage(config, self.lm, self.feed, stream, optimizer, **more)
        optimizer = make_optimizer(self.lm, config.optim, config.grpo.lr, seed)
        keep = self.log.completions if self.mesh.first else _forget
        more |= {"keep": keep, "say": self.console.message, "warn": self.console.warn}
        stage = GrpoStage(config, self.lm, self._reference(), self.feed, optimizer, seed=seed, **more)
        longest = self.mesh.everyone.gather(self.inputs.longest)[0]  # the first process opened the videos
        if config.grpo.steps and longest is not None and wanted(config, self.lm.device):
            stage.probe(longest.sample)
        return stage

    def _reference(self) -> VideoLM | None:
        """The frozen policy from which GRPO started: the end of the stage before, or the model folder. Where adapters
        alone are trained it shares the model's other weights.
        """
        if self.config.grpo.beta == 0:
            return None
        before = self.config.train.stages.index("grpo") - 1
        start = self.checkpoints / checkpoint_name(self.config.train.stages[before], None) if before >= 0 else None
        if self.config.lora.rank and is_frozen(self.lm):
            adapters = saved_adapters(load_checkpoint(start).tensors) if start else None
            return AdapterReference(self.lm, adapters)
        reference = load_model(self.config.model, self.inputs.info, self.config.kernels.layers)
        if start:
            load_weights_into(start, reference.module)
        reference.module.requires_grad_(False)
        reference.module.eval()
        return reference if self.mesh.weights is None else ShardedLM(reference, self.mesh.weights)

    def _after_step(self, stage: Stage, name: str, step: int) -> None:
        every, final = self.config.checkpoint.every, step == self.steps(name)
        if self.mesh.everyone.any(self._stop_signal is not None):  # a signal may have come between two processes' steps
            self._stop_signal = self._stop_signal or "a signal to another process"
        if final or self._stop_signal or (every and step % every == 0):
            self._save(stage, name, step, final=final)
        if self._stop_signal:
            raise self._stopped(f"after step {step} of {name}")

    def _stopped(self, when: str) -> Stopped:
        fix = "go on with the same command and --resume"
        return Stopped(Problem("VRLT-S02", f"stopped by {self._stop_signal} {when}", self.config.train.out, fix=fix))

    def _save(self, stage: Stage, name: str, step: int, *, final: bool) -> None:
        optimizer = stage.optimizer
        state = {
            "stage": name,
            "step": step,
            "final": final,
            "stream": stage.stream.state(),
            "stage_state": stage.state(),
            "feed": self.mesh.replicas.gather(self.feed.state()),
            "data": self.inputs.fingerprint,
            "bad_steps": self.guard.in_a_row,
        }
        if self.mesh.first or isinstance(self.lm, ShardedPolicy):
            self._write_checkpoint(optimizer, checkpoint_name(name, None if final else step), state)
        if self.mesh.first:
            prune(self.checkpoints, name, self.config.checkpoint.keep)
        self.mesh.everyone.wait()  # the next stage opens it

    def _write_checkpoint(self, optimizer: MasterAdamW, name: str, state: dict[str, Any]) -> None:
        save_checkpoint(
            self.checkpoints / name,
            model=self.lm.whole.module,
            tokenizer_files=Path(self.inputs.info.path),
            tensors={
                **optimizer_tensors(optimizer, optimizer.masters, optimizer.parameters),
                **optimizer.copies(),
                **adapter_tensors(self.lm.module),
                **rng_tensors(),
            },
            state=state,
            writers=self.mesh.everyone if isinstance(self.lm, ShardedPolicy) else None,
        )

    def _evaluate(self, label: str, stage: str, step: int) -> None:
        samples = self.inputs.heldout
        if not samples or label in self._evaluated:
            return
        with self.console.progress(f"evaluate {label}", len(samples)) as advance:

            def tick(done: int) -> None:
                advance(done)
                if self._stop_signal:
                    raise self._stopped(f"in the evaluation of {label}")

            root = data_root(self.config, "eval")
            result = evaluate(
                self.lm,
                samples,
                self.clips,
                self.config,
                root=root,
                progress=tick,
                cache=self.embeds,
                replicas=self.mesh.replicas,
                peers=self.mesh.peers,
            )
        if not self.mesh.first:
            return
        for error in result.failed:
            self.console.warn(f"question left out of the evaluation: {error}")
        write_lines(self.run_dir / "eval" / f"{label}.jsonl", result.rows)
        self.log.eval(
            {"label": label, "stage": stage, "step": step, "metrics": result.metrics, "failed": len(result.failed)}
        )
        records = [r for r in read_jsonl_tolerant(self.run_dir / "metrics.jsonl") if r["kind"] == "eval"]
        self.console.eval_table(records)


def _forget(lines: list[dict[str, Any]]) -> None:
    """The first process writes them."""
