"""The training loop and what it is made of. Nothing here knows which loss it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler

from sward import checkpointing, data
from sward.config import OptimizerConfig, TrainingConfig
from sward.data import Sample, SegmentationDataset
from sward.evaluation import Evaluation, evaluate
from sward.features import FeatureTaps
from sward.losses import LOGITS, DistillationInputs, DistillationLoss
from sward.tracking import Progress, RunFolder


class FrozenTeacher:
    """A teacher in eval mode, without gradient, that hands out the maps a distillation loss asks for.

    Args:
        network: the teacher. Its parameters stop asking for gradients.
        layers: layers to catch, or `"logits"` for its output.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.taps = FeatureTaps(network, [layer for layer in layers if layer != LOGITS], detach=True).open()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """`images [B, 3, H, W]` -> tap name -> `[B, C, h, w]`, with the logits."""
        logits = self.network(images)
        return {**self.taps.collect(), LOGITS: logits}


class TrainingStep(nn.Module):
    """Network, task loss and distillation loss as one module: one thing to optimise, to save and to wrap for DDP.

    Args:
        model: the network that learns.
        task: `(logits, labels) -> scalar`.
        distillation: None to train on the labels alone.
    """

    def __init__(self, model: nn.Module, task: nn.Module, distillation: DistillationLoss | None = None) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.distillation = distillation
        layers = [] if distillation is None else [tap for tap in distillation.student_taps if tap != LOGITS]
        self.taps = FeatureTaps(model, layers).open()

    def forward(
        self, images: Tensor, labels: Tensor, teacher: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch with gradient, and its terms, unweighted and detached."""
        logits = self.model(images)
        task = self.task(logits, labels)
        terms = {"task": task.detach().float()}
        if self.distillation is None:
            return task, terms
        student = {**self.taps.collect(), LOGITS: logits}
        output = self.distillation(DistillationInputs(student, teacher, labels))
        return task + output.loss, terms | output.terms


class EpochSampler(Sampler[int]):
    """A new order of `length` indices each epoch, a function of the seed and the epoch; can start inside an epoch."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch, self.skip = length, seed, 0, 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(data.sample_seed(self.seed, self.epoch, self.length))
        yield from torch.randperm(self.length, generator=generator).tolist()[self.skip :]

    def __len__(self) -> int:
        return self.length - self.skip


def batches(
    dataset: SegmentationDataset, batch: int, *, seed: int, workers: int = 0, start: int = 0, pin_memory: bool = False
) -> Iterator[Sample]:
    """Training batches without end, from step `start`. The same seed gives the same batches, wherever it starts.

    Args:
        dataset: images and labels of equal size.
        batch: images a batch; the last, smaller batch of an epoch is dropped.
        seed: of the order; augmentation follows the data set's own seed.
        workers: loader processes; they do not change what comes out.
        start: batches to pass over, without reading them.
        pin_memory: put batches into page-locked memory, from where a GPU fetches them while it computes.

    Raises:
        CorruptFileError: an image cannot be read.
    """
    sampler = EpochSampler(len(dataset), seed)
    loader = DataLoader(
        dataset,
        batch_size=batch,
        sampler=sampler,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        # Its own generator: iterating must not move torch's global one, which dropout draws from.
        generator=torch.Generator().manual_seed(seed),
    )
    sampler.epoch, done = divmod(start, len(dataset) // batch)
    sampler.skip = done * batch
    while True:
        dataset.set_epoch(sampler.epoch)
        try:
            yield from loader
        except data.CorruptFileError as error:
            # A loader process sends its traceback along; the sentence that names the file is its last line.
            raise data.CorruptFileError(str(error).splitlines()[-1].rpartition("CorruptFileError: ")[2]) from error
        sampler.epoch, sampler.skip = sampler.epoch + 1, 0


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
    """Trains `step_module` as `config` says and leaves a run folder that can be resumed, evaluated and repeated."""
    device = next(step_module.parameters()).device
    steps, epoch = config.steps(len(train_set)), len(train_set) // config.batch
    validate_every = epoch * config.evaluate_every if config.evaluate_every else steps
    learnable = [parameter for parameter in step_module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnable, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
    schedule = LambdaLR(optimizer, learning_rate(config.optimizer, steps))
    state = TrainingState(step_module, optimizer, schedule)
    if config.resume and run.last.exists():
        state.load_state_dict(checkpointing.load(run.last))
        run.drop_records_after(state.step)
    stream = batches(
        train_set,
        config.batch,
        seed=config.seed,
        workers=config.dataset.workers,
        start=state.step,
        pin_memory=device.type == "cuda",
    )
    evaluation = None
    step_module.train()
    with Progress(run.path.name, steps, start=state.step) as progress:
        while state.step < steps:
            started = time.perf_counter()
            images, labels, _ = next(stream)
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            features = {} if teacher is None else teacher(images)
            loss, terms = step_module(images, labels, features)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            state.step += 1
            state.seconds += time.perf_counter() - started
            progress.advance()
            if state.step % config.log_every == 0 or state.step == steps:
                record = log_record(
                    state, loss, terms, images_per_second=config.batch / (time.perf_counter() - started)
                )
                run.log(record)
                progress.note(f"loss {record['loss']:.3f}")
            if state.step % validate_every == 0 or state.step == steps:
                evaluation = evaluate(step_module.model, validation_set, device=device)
                run.log({"step": state.step, "validation": asdict(evaluation)})
                state.keep(run, evaluation.score(config.metric))
    evaluation = evaluation or evaluate(step_module.model, validation_set, device=device)
    return TrainingResult(run.path, evaluation, state.best_score, state.seconds)


def log_record(
    state: TrainingState, loss: Tensor, terms: Mapping[str, Tensor], images_per_second: float
) -> dict[str, Any]:
    """One line of `metrics.jsonl`. The only place of the loop that waits for the device."""
    return {
        "step": state.step,
        "loss": loss.item(),
        **{name: value.item() for name, value in terms.items()},
        "lr": state.schedule.get_last_lr()[0],
        "images_per_second": images_per_second,
        "seconds": state.seconds,
    }


class TrainingState:
    """Everything that changes while a run trains, and its place in the run folder."""

    def __init__(self, step_module: TrainingStep, optimizer: Optimizer, schedule: LambdaLR) -> None:
        self.step_module, self.optimizer, self.schedule = step_module, optimizer, schedule
        self.step = 0
        self.seconds = 0.0
        self.best_score = -math.inf

    def keep(self, run: RunFolder, score: float) -> None:
        """Saves the last checkpoint, and the best one if `score` beats every earlier one."""
        if score > self.best_score:
            self.best_score = score
            checkpointing.save(run.best, {"model": self.step_module.model.state_dict(), "step": self.step})
        checkpointing.save(run.last, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        loss = self.step_module.distillation
        return {
            "model": self.step_module.model.state_dict(),
            "distillation": {} if loss is None else loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": [torch.get_rng_state(), *(generator.get_state() for generator in _generators(loss))],
            "step": self.step,
            "seconds": self.seconds,
            "best_score": self.best_score,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        loss = self.step_module.distillation
        self.step_module.model.load_state_dict(state["model"])
        if loss is not None:
            loss.load_state_dict(state["distillation"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["generators"][0])
        for generator, saved in zip(_generators(loss), state["generators"][1:], strict=True):
            generator.set_state(saved)
        self.step, self.seconds, self.best_score = state["step"], state["seconds"], state["best_score"]


def _generators(loss: DistillationLoss | None) -> list[torch.Generator]:
    if loss is None:
        return []
    found = (getattr(module, "generator", None) for module in loss.modules())
    return [generator for generator in found if isinstance(generator, torch.Generator)]
