"""The training loop; it works with any loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sward import distributed
from sward.config import DistillationConfig, OptimizerConfig, TrainingConfig
from sward.data import SegmentationDataset
from sward.data.shards import ImageShards
from sward.data.unlabelled import UnlabelledImages, join
from sward.evaluation import Evaluation, evaluate
from sward.losses import LOGITS
from sward.training.batches import batches, unlabelled_batches, unlabelled_per_step
from sward.training.host_memory import keep_freed_memory
from sward.training.interruption import Interruption, TrainingInterrupted
from sward.training.observation import CollapseWatch, LossWatch, Throughput, losses_of, peak_memory
from sward.training.progress import Progress
from sward.training.pseudo_labels import pseudo_labels
from sward.training.run_folder import RunFolder
from sward.training.state import TrainingState
from sward.training.step import StepOutput, TrainingStep


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Return a function from step to a factor of the initial learning rate; 0 after the last step."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        left = 1 - (step - config.warmup) / max(steps - config.warmup, 1)
        left = min(max(left, 0.0), 1.0)
        return left**config.power if config.schedule == "poly" else 0.5 * (1 - math.cos(math.pi * left))

    return factor


@dataclass
class TrainingResult:
    """Scores and duration of a finished run."""

    run: Path
    """Folder of the run."""
    evaluation: Evaluation
    """Scores of the final weights on the validation split."""
    best_score: float
    """Best validation score of the run, by `config.metric`."""
    seconds: float
    """Time in the training loop, validation excluded."""


def first_state(
    step_module: TrainingStep, config: TrainingConfig, images: int, identity: Mapping[str, str] | None = None
) -> TrainingState:
    """Return the state of a run before its first step, with the optimiser and schedule of `config`.

    Args:
        step_module: what is trained.
        config: configuration of the run.
        images: number of training images.
        identity: checksums of the data and the teacher, see `TrainingState`.
    """
    device = next(step_module.parameters()).device
    learnable = [parameter for parameter in step_module.parameters() if parameter.requires_grad]
    # On a CPU the fused update reads and writes each tensor once; the default takes a pass per operation.
    optimizer = torch.optim.AdamW(
        learnable,
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        fused=True if device.type == "cpu" else None,
    )
    factor = learning_rate(config.optimizer, config.steps(images))
    scaler = torch.amp.GradScaler(device.type, enabled=step_module.precision == "fp16")
    return TrainingState(
        step_module.model,
        step_module.distillation,
        optimizer,
        lambda step: config.optimizer.lr * factor(step),
        scaler,
        config.optimizer.clip_norm,
        identity,
        step_module.task,
    )


def fit(
    step_module: TrainingStep,
    config: TrainingConfig,
    train_set: SegmentationDataset,
    validation_set: SegmentationDataset,
    run: RunFolder,
    state: TrainingState,
    *,
    teacher: Callable[[Tensor], dict[str, Tensor]] | None = None,
    unlabelled: UnlabelledImages | ImageShards | None = None,
) -> TrainingResult:
    """Train `step_module` from `state` on as `config` says; the run folder can be resumed and evaluated.

    With `unlabelled`, every step also sees some of these images, whose labels are all ignored; how many, says
    `DistillationConfig.unlabelled_per_step`.
    Every process of a group must call this.

    Raises:
        TrainingInterrupted: on Ctrl-C or SIGTERM, after writing a checkpoint.
        NonFiniteLossError: if the loss is infinite or nan; nothing is saved after that.
    """
    device = next(step_module.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    steps, epoch = config.steps(len(train_set)), len(train_set) // config.batch
    validate_every = epoch * config.evaluate_every if config.evaluate_every else steps
    stream = batches(
        train_set,
        config.batch,
        seed=config.seed,
        workers=config.dataset.workers,
        start=state.step,
        pin_memory=device.type == "cuda",
    )
    extra_per_step = unlabelled_per_step(config, train_set, unlabelled)
    hidden = distributed.share_of(extra_per_step)
    if unlabelled is not None:
        extra = unlabelled_batches(
            unlabelled,
            extra_per_step,
            workers=config.dataset.workers,
            start=state.step,
            pin_memory=device.type == "cuda",
        )
        stream = (join(*both) for both in zip(stream, extra))
    ignore_index = train_set.info.ignore_index
    confidence = config.pseudo_labels if isinstance(config, DistillationConfig) else None
    replica = distributed.replicate(step_module.train(), device)
    collapse = CollapseWatch()
    evaluation, watch = None, LossWatch()

    def scored() -> Evaluation:
        state.validation_due = True
        with _saving_on_error(state, run, watch), state.stopwatch.paused():
            if config.batch_norm_images is not None:
                # A run that resumes here has not drawn a batch yet.
                train_set.set_epoch((state.step - 1) // epoch)
                estimate_batch_norm(step_module.model, train_set, config.batch_norm_images, config.batch)
            found = validate(step_module.model, validation_set, device)
        run.log({"step": state.step, "validation": found.to_dict()})
        state.validation_due = False
        return found

    throughput = Throughput(config.batch + extra_per_step, state.step, state.stopwatch.read())
    with Progress(run.path.name, steps, start=state.step) as progress, Interruption() as interruption:
        if state.validation_due:
            evaluation = scored()
            state.save(run, evaluation.score(config.metric))
        while state.step < steps:
            logs, saves, validates = (
                (state.step + 1) % every == 0 or state.step + 1 == steps
                for every in (config.log_every, config.checkpoint_every, validate_every)
            )
            with _saving_on_error(state, run, watch):
                batch = next(stream)
            images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
            seen = images if batch.teacher_images is None else batch.teacher_images.to(device, non_blocking=True)
            features = {} if teacher is None else teacher(seen)
            share = None
            if hidden:
                inside = labels[-hidden:] != ignore_index
                labels[-hidden:] = ignore_index
                if confidence is not None:
                    labels, share = pseudo_labels(
                        labels, features[LOGITS], inside, confidence=confidence, ignore_index=ignore_index
                    )
            output = replica(images, labels, features, diagnose=logs)
            gradient_norm = state.update(output.loss, measure=logs)
            taught = {f"the teacher's map {layer!r}": maps for layer, maps in features.items()}
            watch.remember(state.step, output, batch.names, {"the image": images, **taught})
            progress.advance()
            # Several processes exchange signals only at log steps, where they synchronise anyway.
            stop = interruption.agreed() if logs or distributed.world_size() == 1 else None
            if logs or saves or validates or stop:
                watch.check()
            if logs:
                record = log_record(state, output, gradient_norm, throughput, device)
                if share is not None:
                    record["pseudo_labelled_share"] = distributed.mean(share[None]).item()
                run.log(record)
                collapse.look(record.get("diagnostics", {}))
                progress.note(f"loss {record['loss']:.3f}")
            score = None
            if validates:
                evaluation = scored()
                score = evaluation.score(config.metric)
                stop = stop or interruption.agreed()
            if saves or validates or stop:
                state.save(run, score)
            if stop:
                raise TrainingInterrupted(stop, state.step, steps, run.path)
    seconds = state.stopwatch.read()
    evaluation = evaluation or validate(step_module.model, validation_set, device)
    return TrainingResult(run.path, evaluation, state.best_score, seconds)


@contextmanager
def _saving_on_error(state: TrainingState, run: RunFolder, watch: LossWatch) -> Iterator[None]:
    """Save a checkpoint before an error of the data or the validation ends the run; none before its first step."""
    try:
        yield
    except Exception:
        # With several processes the others may not have failed, and saving needs all of them.
        if distributed.world_size() == 1 and state.step:
            watch.check()
            state.save(run)
        raise


def estimate_batch_norm(model: nn.Module, dataset: SegmentationDataset, images: int, batch: int) -> None:
    """Set the running statistics of trained batch norms to their means over the first `images` images of `dataset`.

    Those that stay in eval mode while the model trains, as in a frozen trunk, keep theirs. Reads full batches of the
    current epoch's views (one smaller batch if there are fewer images than that). Restores the state of the random
    generators, so that training continues as without it.
    """
    device = next(model.parameters()).device
    images = min(images, len(dataset))
    batch = min(batch, images)
    training = model.training
    model.train()
    momenta = {
        module: module.momentum for module in model.modules() if isinstance(module, _BatchNorm) and module.training
    }
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    starts = range(0, images - batch + 1, batch) if momenta else ()
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with forked, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for first in starts:
            model(torch.stack([dataset[index].image for index in range(first, first + batch)]).to(device))
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    model.train(training)


def validate(model: nn.Module, dataset: SegmentationDataset, device: torch.device) -> Evaluation:
    """Score the model as it will be saved, on all processes together; runs uncompiled, since label sizes may vary."""
    distributed.broadcast_buffers(model)
    with torch.compiler.set_stance("force_eager"):
        return evaluate(model, dataset, device=device, process_group=distributed.group())


def log_record(
    state: TrainingState,
    output: StepOutput,
    gradient_norm: Tensor | None,
    throughput: Throughput,
    device: torch.device,
) -> dict[str, Any]:
    """Return one line of `metrics.jsonl`; waits for the device."""
    losses = losses_of(output)
    seconds = state.stopwatch.read()
    # Where fp16 overflows and the step is skipped, it is infinite, which JSON cannot hold.
    norm = None if gradient_norm is None else gradient_norm.item()
    return {
        "step": state.step,
        **losses,
        "lr": state.optimizer.param_groups[0]["lr"],
        "gradient_norm": None if norm is None or not math.isfinite(norm) else norm,
        "images_per_second": throughput.until(state.step, seconds),
        "peak_memory_bytes": peak_memory(device),
        "seconds": seconds,
    }
