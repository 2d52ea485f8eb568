"""The parts that time: windowed distillation per precision, the other operations, tiles, a training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.operation import fp32_products, maps_of, oracle_of, shift_on, verdict
from gpu_parts.rows import DTYPES, LAYOUTS, Row, Stage, Suite
from harness import worst_error
from sward_kernels import prototype_discrimination, relational_kl, windowed_distillation, windowed_feature_distillation
from sward_kernels.windows import WindowGrid


def ideal_bytes(stage: Stage, dtype: torch.dtype, direction: str) -> int:
    """Read queries, keys and values of both sides once; backward also writes as many gradients."""
    maps = 2 * 3 * stage.batch * stage.dim * stage.height * stage.width * dtype.itemsize
    return maps if direction == "forward" else 2 * maps


def time_windowed(suite: Suite, dtype: str, providers: tuple[str, ...], stages: tuple[Stage, ...]) -> None:
    """Forward and backward of every provider, apart."""
    with fp32_products("tf32" if dtype == "tf32" else "ieee"):
        for layout in LAYOUTS:
            for stage in stages:
                _time_stage(suite, stage, dtype, layout, providers)


def _time_stage(suite: Suite, stage: Stage, dtype: str, layout: str, providers: tuple[str, ...]) -> None:
    # Made by the first row that needs them, so that what does not fit the memory is an error of rows.
    maps = cache(lambda: maps_of(stage, DTYPES[dtype], layout, suite.device))
    oracle = cache(lambda: oracle_of(stage, maps()))
    for provider in providers:
        # One call for both directions: `torch.compile` takes many seconds.
        call = cache(lambda provider=provider: _call(stage, maps(), provider))
        for direction in ("forward", "backward"):
            suite.attempt(
                lambda provider=provider, call=call, direction=direction: (  # type: ignore[misc]
                    _timed(suite, stage, maps(), oracle, call, provider, direction, dtype)
                ),
                **{"case": str(stage), "provider": provider, "pass": direction},
                dtype=dtype,
                layout=layout,
            )


Call = tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]
"""A forward pass, and the tensors that its backward pass differentiates."""


def _timed(
    suite: Suite,
    stage: Stage,
    maps: list[Tensor],
    oracle: Callable[[], dict[str, Tensor]],
    call: Callable[[], Call],
    provider: str,
    direction: str,
    dtype: str,
) -> Row:
    size = ideal_bytes(stage, maps[0].dtype, direction)
    if provider == "copy":
        source = torch.empty(size // 2, dtype=torch.int8, device=suite.device)
        target = torch.empty_like(source)
        return _with_bandwidth(suite.milliseconds(lambda: target.copy_(source)), size)
    forward, inputs = call()
    outputs = forward()
    # Times the number of pixels, the gradients of a loss are in the range of float16; attention's are without it.
    scale = 1 if provider == "sdpa" else stage.pixels
    upstream = tuple(torch.full_like(each, scale) for each in outputs)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)

    if provider == "sdpa":  # it also reads or writes its outputs, so `size` is not what it moves
        return {"ms": suite.milliseconds(forward if direction == "forward" else backward)}
    results = dict(zip(("loss", "student", "teacher"), (outputs[0].detach(), *backward())))
    row = verdict(worst_error(results, oracle()), dtype)
    return _with_bandwidth(suite.milliseconds(forward if direction == "forward" else backward), size) | row


def _with_bandwidth(milliseconds: float, size: int) -> Row:
    return {"ms": milliseconds, "GB/s": size / milliseconds / 1e6}


def _call(stage: Stage, maps: list[Tensor], provider: str) -> Call:
    shift = shift_on(maps[0].device)
    if provider == "sdpa":
        # Attention alone, of windows that lie one after another already.
        grid = WindowGrid(stage.height, stage.width, stage.window_size)
        sides = [
            [
                part.flatten(0, 1)[:, None].contiguous().detach().requires_grad_()
                for part in grid.partition(each.detach(), shift).chunk(3, dim=-1)
            ]
            for each in maps
        ]

        def attention() -> tuple[Tensor, ...]:
            return tuple(F.scaled_dot_product_attention(query, key, value) for query, key, value in sides)

        return attention, [part for side in sides for part in side]
    implementation = "reference" if provider == "torch.compile(reference)" else provider.split(",")[0]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return windowed_distillation(student, teacher, stage.window_size, shift, implementation=implementation).loss

    if provider == "torch.compile(reference)":
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True)
    return lambda: (loss(maps[0], maps[1]),), maps


def time_dtype(dtype: str) -> Callable[[Suite], None]:
    def run(suite: Suite) -> None:
        headline, *others = suite.sizes.stages
        time_windowed(suite, dtype, ("triton", "copy", "sdpa", "eager", "reference"), (headline,))
        if dtype == "bf16" or not suite.rehearsal:
            time_windowed(suite, dtype, ("triton", "copy", "eager"), tuple(others))

    return run


def time_compiled(suite: Suite) -> None:
    """`torch.compile` takes many seconds per case: the headline alone, the important types first."""
    if suite.rehearsal:
        suite.attempt(lambda: {"note": "skipped: needs a GPU"}, case="torch.compile(reference)")
        return
    for dtype in ("bf16", "fp32", "tf32", "fp16"):
        time_windowed(suite, dtype, ("torch.compile(reference)",), suite.sizes.stages[:1])


def time_others(suite: Suite) -> None:
    """Windowed distillation from features, the prototype regularization and the relational KL."""
    for dtype in ("bf16", "fp16"):
        for layout in LAYOUTS:
            for stage, channels in suite.sizes.features:
                _time_features(suite, stage, channels, dtype, layout)
    for dtype in ("bf16", "fp32"):
        for layout in LAYOUTS:
            for size in suite.sizes.prototypes:
                _time_prototypes(suite, size, dtype, layout)
    for dtype in ("fp32", "tf32"):
        with fp32_products("tf32" if dtype == "tf32" else "ieee"):
            _time_relation(suite, dtype)


def _time_features(suite: Suite, stage: Stage, channels: int, dtype: str, layout: str) -> None:
    """Projections inside the kernels, and 1x1 convolutions before them; the teacher is frozen, as in MWADLoss."""

    @cache
    def tensors() -> list[Tensor]:
        generator = torch.Generator(suite.device).manual_seed(0)
        shape = (2, stage.batch, channels, stage.height, stage.width)
        maps = torch.randn(shape, generator=generator, device=suite.device)
        student, teacher = (each.to(DTYPES[dtype], memory_format=LAYOUTS[layout]) for each in maps)
        weights = torch.randn(2, 3 * stage.dim, channels, generator=generator, device=suite.device) / channels**0.5
        weight_student, weight_teacher = weights.to(DTYPES[dtype])
        return [student, teacher, weight_student, weight_teacher, shift_on(suite.device)]

    def inside(implementation: str) -> Loss:
        return lambda student, teacher, weight_student, weight_teacher, shift: (
            windowed_feature_distillation(
                *(student, teacher, weight_student, weight_teacher),
                window_size=stage.window_size,
                shift=shift,
                implementation=implementation,
            ).loss
        )

    def before(
        student: Tensor, teacher: Tensor, weight_student: Tensor, weight_teacher: Tensor, shift: Tensor
    ) -> Tensor:
        qkv_student = F.conv2d(student, weight_student[:, :, None, None])
        qkv_teacher = F.conv2d(teacher, weight_teacher[:, :, None, None])
        return windowed_distillation(qkv_student, qkv_teacher, stage.window_size, shift, implementation="triton").loss

    size = 2 * stage.batch * channels * stage.height * stage.width  # bytes of one map of 16-bit numbers
    _time_all(
        suite,
        {"triton": inside("triton"), "convolutions, triton": before},
        inside("eager"),
        tensors,
        (0, 2),
        {"forward": 2 * size, "backward": 3 * size},
        stage.pixels / 256,  # float16 holds the gradients of the maps, and those of the weights, sums over all pixels
        case=f"windowed_feature_distillation C={channels} {stage}",
        dtype=dtype,
        layout=layout,
    )


def _time_prototypes(suite: Suite, shape: tuple[int, int, int, int, int], dtype: str, layout: str) -> None:
    *sides, classes = shape
    batch, _, height, width = sides

    @cache
    def tensors() -> list[Tensor]:
        generator = torch.Generator(suite.device).manual_seed(0)
        labels = torch.randint(classes, (batch, height, width), generator=generator, device=suite.device)
        values = torch.randn(sides, generator=generator, device=suite.device)
        return [values.to(DTYPES[dtype], memory_format=LAYOUTS[layout]), labels]

    def loss_of(implementation: str) -> Loss:
        return lambda features, labels: (
            prototype_discrimination(features, labels, classes, implementation=implementation).loss
        )

    size = math.prod(sides) * DTYPES[dtype].itemsize
    _time_all(
        suite,
        {name: loss_of(name) for name in ("triton", "eager", "reference")},
        loss_of("eager"),
        tensors,
        (0,),
        {"forward": size, "backward": 2 * size},
        1,
        case=f"prototype_discrimination {'x'.join(map(str, sides))} K={classes}",
        dtype=dtype,
        layout=layout,
    )


def _time_relation(suite: Suite, dtype: str) -> None:
    images, pixels, channels = suite.sizes.relation

    @cache
    def tensors() -> list[Tensor]:
        generator = torch.Generator(suite.device).manual_seed(0)
        return list(torch.randn(2, images, pixels, channels, generator=generator, device=suite.device))

    def loss_of(implementation: str) -> Loss:
        return lambda student, teacher: relational_kl(student, teacher, implementation=implementation)

    size = 4 * images * pixels * channels
    _time_all(
        suite,
        {name: loss_of(name) for name in ("triton", "eager", "reference")},
        loss_of("eager"),
        tensors,
        (0,),
        {"forward": 2 * size, "backward": 3 * size},
        1,
        case=f"relational_kl B={images} P={pixels} C={channels}",
        dtype=dtype,
        layout="",
    )


Loss = Callable[..., Tensor]


def _time_all(
    suite: Suite,
    losses: dict[str, Loss],
    eager: Loss,
    tensors: Callable[[], list[Tensor]],
    differentiated: tuple[int, ...],
    sizes: dict[str, int],
    scale: float,
    dtype: str,
    **place: str,
) -> None:
    """Forward and backward of every provider, apart; `eager` in fp32 is the oracle.

    `differentiated` are the places of the tensors that get a gradient, which is compared times `scale`.
    """

    def leaves_of(inputs: list[Tensor]) -> list[Tensor]:
        return [each.detach().requires_grad_(index in differentiated) for index, each in enumerate(inputs)]

    def backward_of(value: Tensor, leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        wanted, upstream = [leaves[index] for index in differentiated], torch.full_like(value, scale)
        return lambda: torch.autograd.grad(value, wanted, upstream, retain_graph=True)

    def named(value: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"loss": value.detach()} | {f"gradient {index}": each for index, each in enumerate(gradients)}

    @cache
    def oracle() -> dict[str, Tensor]:
        with fp32_products("ieee"):
            leaves = leaves_of([each.float() if each.is_floating_point() else each for each in tensors()])
            value = eager(*leaves)
            return named(value, backward_of(value, leaves)())

    def run(loss: Loss, direction: str, size: int) -> Row:
        leaves = leaves_of(tensors())
        value = loss(*leaves)
        backward = backward_of(value, leaves)
        row = verdict(worst_error(named(value, backward()), oracle()), dtype)
        milliseconds = suite.milliseconds((lambda: loss(*leaves)) if direction == "forward" else backward)
        return _with_bandwidth(milliseconds, size) | row

    for provider, loss in losses.items():
        for direction, size in sizes.items():
            suite.attempt(
                lambda loss=loss, direction=direction, size=size: run(loss, direction, size),  # type: ignore[misc]
                provider=provider,
                **{"pass": direction},
                dtype=dtype,
                **place,
            )


ALTERNATIVES: dict[tuple[str, str], tuple[tuple[int, int, int, int], ...]] = {
    ("bf16", "channels_last"): ((64, 64, 64, 4), (64, 64, 32, 4), (64, 64, 16, 4), (64, 64, 64, 8)),
    ("bf16", "nchw"): ((64, 64, 32, 4), (64, 64, 16, 4), (64, 64, 32, 8)),
    ("fp32", "channels_last"): ((64, 64, 16, 4), (64, 64, 32, 4), (64, 64, 16, 8), (16, 16, 32, 4)),
    ("tf32", "channels_last"): ((64, 64, 16, 4), (64, 64, 32, 4), (16, 16, 32, 4)),
    ("fp32", "nchw"): ((64, 64, 16, 4), (16, 16, 32, 4)),
}
"""Tiles to try beside the table's, both passes with the same: rows, keys, channels, warps."""


def compare_tiles(suite: Suite) -> None:
    """The headline with the table's tiles and with others, whose results must agree."""
    combinations = list(ALTERNATIVES.items())
    for (dtype, layout), alternatives in combinations[:: 3 if suite.rehearsal else 1]:
        with fp32_products("tf32" if dtype == "tf32" else "ieee"):
            _compare_tiles_of(suite, dtype, layout, alternatives[:1] if suite.rehearsal else alternatives)


def _compare_tiles_of(
    suite: Suite, dtype: str, layout: str, alternatives: tuple[tuple[int, int, int, int], ...]
) -> None:
    from sward_kernels.gpu import launching
    from sward_kernels.windowed import plan
    from sward_kernels.windowed.tile_table import Tiles

    stage, chosen = suite.sizes.stages[0], plan.tiles_of
    maps = cache(lambda: maps_of(stage, DTYPES[dtype], layout, suite.device))
    oracle = cache(lambda: oracle_of(stage, maps()))

    def run(direction: str, may_not_fit: bool) -> Row:
        try:
            return _timed(
                suite, stage, maps(), oracle, lambda: _call(stage, maps(), "triton"), "triton", direction, dtype
            )
        except NotImplementedError as error:
            if may_not_fit and "OutOfResources" in str(error):
                return {"note": "does not fit"}
            raise

    for tiles in (None, *alternatives):
        try:
            plan.tiles_of = chosen if tiles is None else lambda *_, tiles=tiles: Tiles(*tiles)
            launching.forget_calls()
            name = "table" if tiles is None else "{}x{}x{}, {} warps".format(*tiles)
            for direction in ("forward", "backward"):
                suite.attempt(
                    lambda direction=direction, tiles=tiles: run(direction, tiles is not None),  # type: ignore[misc]
                    **{"case": str(stage), "provider": f"triton, {name}", "pass": direction},
                    dtype=dtype,
                    layout=layout,
                )
        finally:
            plan.tiles_of = chosen
            launching.forget_calls()


def time_step(suite: Suite) -> None:
    """A training step of a preset, and the share of distillation in it."""
    import training_step

    from sward import presets

    student = presets.get(suite.sizes.preset).student
    image_size, batch = suite.sizes.step or (student.dataset.image_size, student.batch)
    case = f"step of {suite.sizes.preset}, {image_size[0]}x{image_size[1]}, batch {batch}"
    rounds = 1 if suite.rehearsal else 3
    clock = f"host included, median of {rounds}"

    def row_of(name: str, value: float) -> Row:
        if name == "memory":
            return {"note": f"{value:.0f} MiB"}
        return {"note": f"{value:.1%} of the student; {clock}"} if name == "share" else {"ms": value, "note": clock}

    def run() -> Row:
        shape = training_step.Shape(suite.sizes.preset, image_size, batch)
        measured = training_step.measure(shape, "sward", suite.device, rounds)
        rows = {name: row_of(name, value) for name, value in measured.items() if isinstance(value, float)}
        whole = rows.pop("step")
        for name, row in rows.items():
            suite.add(case=case, provider=name, **row)
        return whole

    suite.attempt(run, case=case, provider="step")
