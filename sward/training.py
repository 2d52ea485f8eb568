"""The training loop and what it is made of. Nothing here knows which loss it runs."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Sampler

from sward import data, distributed
from sward.config import OptimizerConfig, TrainingConfig
from sward.data import Sample, SegmentationDataset
from sward.evaluation import Evaluation, evaluate
from sward.features import FeatureTaps
from sward.interruption import Interruption, TrainingInterrupted
from sward.losses import LOGITS, DistillationInputs, DistillationLoss
from sward.observation import LossWatch, StepOutput, Throughput, losses_of, peak_memory
from sward.precision import Precision, autocast
from sward.tracking import Progress, RunFolder
from sward.training_state import TrainingState


class FrozenTeacher:
    """A teacher in eval mode, without gradient, that hands out the maps a distillation loss asks for.

    Args:
        network: the teacher. Its parameters stop asking for gradients.
        layers: layers to catch, or `"logits"` for its output.
        precision: of its forward pass.
        dtype: of the maps it hands out. Default: whatever the forward pass gives.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        *,
        precision: Precision = "fp32",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.taps = FeatureTaps(network, [layer for layer in layers if layer != LOGITS], detach=True).open()
        self.precision: Precision = precision
        self.dtype = dtype

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """`images [B, 3, H, W]` -> name -> `[B, C, h, w]` for each of `layers`."""
        with torch.inference_mode(), autocast(images.device, self.precision):
            caught = {LOGITS: self.network(images), **self.taps.collect()}
        # Copied outside of inference mode: autograd may not keep a tensor that was made inside.
        return {layer: caught[layer].to(self.dtype or caught[layer].dtype, copy=True) for layer in self.layers}


class TrainingStep(nn.Module):
    """Network, task loss and distillation loss as one module: one thing to optimise, to save and to wrap for DDP.

    Args:
        model: the network that learns.
        task: `(logits, labels) -> scalar`.
        distillation: None to train on the labels alone.
        precision: of the forward pass, losses included (they keep to float32 where they need it).
    """

    def __init__(
        self,
        model: nn.Module,
        task: nn.Module,
        distillation: DistillationLoss | None = None,
        *,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.precision: Precision = precision
        self.model = model
        self.task = task
        self.distillation = distillation
        layers = [] if distillation is None else [tap for tap in distillation.student_taps if tap != LOGITS]
        self.taps = FeatureTaps(model, layers).open()

    def forward(
        self, images: Tensor, labels: Tensor, teacher: Mapping[str, Tensor], diagnose: bool = False
    ) -> StepOutput:
        """The losses of one batch, with the distillation loss's own signs of health if `diagnose` is set."""
        with autocast(images.device, self.precision):
            logits = self.model(images)
            task = self.task(logits, labels)
            terms = {"task": task.detach().float()}
            if self.distillation is None:
                return StepOutput(task, terms, terms, {})
            inputs = DistillationInputs({**self.taps.collect(), LOGITS: logits}, teacher, labels)
            output = self.distillation(inputs)
            diagnostics: dict[str, Tensor] = {}
            if diagnose:
                with torch.no_grad():
                    diagnostics = self.distillation.diagnostics(inputs)
        return StepOutput(task + output.loss, terms | output.terms, terms | output.weighted_terms(), diagnostics)


class EpochSampler(Sampler[list[int]]):
    """Batches of indices in a new order each epoch, a function of the seed and the epoch; can start inside an epoch.

    The global batch of a step does not depend on the number of processes: each takes its part of the same one.

    Args:
        length: images of the data set; those that do not fill a last batch sit this epoch out.
        batch: images a step, on all processes together.
        seed: of the order.
        part: number of this process, from 0.
        parts: processes.

    Attributes:
        epoch: which order.
        skip: batches of the epoch to pass over.
    """

    def __init__(self, length: int, batch: int, seed: int, *, part: int = 0, parts: int = 1) -> None:
        self.length, self.batch, self.seed, self.part, self.parts = length, batch, seed, part, parts
        self.epoch = self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(data.sample_seed(self.seed, self.epoch, self.length))
        order = torch.randperm(self.length, generator=generator)
        size = self.batch // self.parts
        for index in range(self.skip, self.length // self.batch):
            yield order[index * self.batch + self.part * size :][:size].tolist()

    def __len__(self) -> int:
        return self.length // self.batch - self.skip


def batches(
    dataset: SegmentationDataset, batch: int, *, seed: int, workers: int = 0, start: int = 0, pin_memory: bool = False
) -> Iterator[Sample]:
    """This process's part of the training batches, without end, from step `start`.

    The same seed gives the same batches, wherever it starts, with any number of workers and of processes.

    Args:
        dataset: images and labels of equal size.
        batch: images a batch, on all processes together; the last, smaller batch of an epoch is dropped.
        seed: of the order; augmentation follows the data set's own seed.
        workers: loader processes; they do not change what comes out.
        start: batches to pass over, without reading them.
        pin_memory: put batches into page-locked memory, from where a GPU fetches them while it computes.

    Raises:
        CorruptFileError: an image cannot be read.
        ValueError: if the processes cannot share a batch evenly.
    """
    distributed.share_of(batch)
    sampler = EpochSampler(len(dataset), batch, seed, part=distributed.rank(), parts=distributed.world_size())
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interruption_to_the_trainer,
        # Its own generator: iterating must not move torch's global one, which dropout draws from.
        generator=torch.Generator().manual_seed(seed),
    )
    sampler.epoch, sampler.skip = divmod(start, len(dataset) // batch)
    while True:
        dataset.set_epoch(sampler.epoch)
        try:
            yield from loader
        except data.CorruptFileError as error:
            # A loader process sends its traceback along; the sentence that names the file is its last line.
            raise data.CorruptFileError(str(error).splitlines()[-1].rpartition("CorruptFileError: ")[2]) from error
        sampler.epoch, sampler.skip = sampler.epoch + 1, 0


def _leave_interruption_to_the_trainer(worker: int) -> None:
    # Ctrl-C in a terminal reaches the workers too; without them the trainer could not finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Step -> factor of the initial learning rate; 0 after the last step."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        left = 1 - (step - config.warmup) / max(steps - config.warmup, 1)
        left = min(max(left, 0.0), 1.0)
        return left**config.power if config.schedule == "poly" else 0.5 * (1 - math.cos(math.pi * left))

    return factor


@dataclass
class TrainingResult:
    """What a finished run is worth.

    Attributes:
        run: its folder.
        evaluation: scores of the final weights on the validation split.
        best_score: best validation score of the run, by `config.metric`.
        seconds: time in the training loop, validation excluded.
    """

    run: Path
    evaluation: Evaluation
    best_score: float
    seconds: float


def fit(
    step_module: TrainingStep,
    config: TrainingConfig,
    train_set: SegmentationDataset,
    validation_set: SegmentationDataset,
    run: RunFolder,
    *,
    teacher: Callable[[Tensor], dict[str, Tensor]] | None = None,
) -> TrainingResult:
    """Trains `step_module` as `config` says and leaves a run folder that can be resumed, evaluated and repeated.

    Goes on from the newest whole checkpoint in `run`, if there is one. Called by every process of a group.

    Raises:
        TrainingInterrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
        NonFiniteLossError: if the loss is no longer a number; nothing is saved from then on.
    """
    device = next(step_module.parameters()).device
    steps, epoch = config.steps(len(train_set)), len(train_set) // config.batch
    validate_every = epoch * config.evaluate_every if config.evaluate_every else steps
    learnable = [parameter for parameter in step_module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnable, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
    schedule = LambdaLR(optimizer, learning_rate(config.optimizer, steps))
    scaler = torch.amp.GradScaler(device.type, enabled=step_module.precision == "fp16")
    state = TrainingState(
        step_module.model, step_module.distillation, optimizer, schedule, scaler, config.optimizer.clip_norm
    )
    state.restore(run)
    stream = batches(
        train_set,
        config.batch,
        seed=config.seed,
        workers=config.dataset.workers,
        start=state.step,
        pin_memory=device.type == "cuda",
    )
    replica = distributed.replicate(step_module.train(), device)
    evaluation, watch, throughput = None, LossWatch(), Throughput(config.batch, state.step, state.stopwatch.read())
    with Progress(run.path.name, steps, start=state.step) as progress, Interruption() as interruption:
        while state.step < steps:
            logs, saves, validates = (
                (state.step + 1) % every == 0 or state.step + 1 == steps
                for every in (config.log_every, config.checkpoint_every, validate_every)
            )
            images, labels, names = next(stream)
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            features = {} if teacher is None else teacher(images)
            output = replica(images, labels, features, diagnose=logs)
            gradient_norm = state.update(output.loss, measure=logs)
            watch.remember(state.step, output, names)
            progress.advance()
            # Several processes agree on a signal only where they meet anyway.
            stop = interruption.agreed() if logs or distributed.world_size() == 1 else None
            if logs or saves or validates or stop:
                watch.check()
            if logs:
                record = log_record(state, output, gradient_norm, throughput, device)
                run.log(record)
                progress.note(f"loss {record['loss']:.3f}")
            score = None
            if validates:
                with state.stopwatch.paused():
                    if config.batch_norm_images is not None:
                        estimate_batch_norm(step_module.model, train_set, config.batch_norm_images, config.batch)
                    evaluation = validate(step_module.model, validation_set, device)
                run.log({"step": state.step, "validation": evaluation.to_dict()})
                score = evaluation.score(config.metric)
            if saves or validates or stop:
                state.save(run, score)
            if stop:
                raise TrainingInterrupted(stop, state.step, steps, run.path)
    seconds = state.stopwatch.read()
    evaluation = evaluation or validate(step_module.model, validation_set, device)
    return TrainingResult(run.path, evaluation, state.best_score, seconds)


def estimate_batch_norm(model: nn.Module, dataset: SegmentationDataset, images: int, batch: int) -> None:
    """Sets the statistics of every batch normalisation to their means over the first `images` images of `dataset`.

    As `torch.optim.swa_utils.update_bn`, over whole batches of views of the current epoch (fewer images than a batch
    are one batch). Dropout's random numbers are put back, so that training goes on as if nothing had been estimated.
    """
    device = next(model.parameters()).device
    images = min(images, len(dataset))
    batch = min(batch, images)
    views = (
        torch.stack([dataset[index].image for index in range(first, first + batch)])
        for first in range(0, images - batch + 1, batch)
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
        update_bn(views, model, device)


def validate(model: nn.Module, dataset: SegmentationDataset, device: torch.device) -> Evaluation:
    """Scores the model as it will be saved, by all processes together. Never compiled: label sizes may vary."""
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
    """One line of `metrics.jsonl`. Here the loop waits for the device."""
    losses = losses_of(output)
    seconds = state.stopwatch.read()
    return {
        "step": state.step,
        **losses,
        "lr": state.schedule.get_last_lr()[0],
        "gradient_norm": None if gradient_norm is None else gradient_norm.item(),
        "images_per_second": throughput.until(state.step, seconds),
        "peak_memory_bytes": peak_memory(device),
        "seconds": seconds,
    }
