"""Grids, arguments and registration of the Triton kernels of windowed distillation of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sward_kernels.fallback import warn_once
from sward_kernels.gpu.launching import CallCache, PreparedLaunch, require_dtype, require_gpu
from sward_kernels.registration import first_derivative_only, refuse_forward_mode, register
from sward_kernels.windowed.gradient_in_forward import Terms, precision
from sward_kernels.windowed.launch import allocate_gradient, known_arguments, memory_format, shift_arguments
from sward_kernels.windowed_features import api
from sward_kernels.windowed_features.plan import Plan, Problem, other_side, plan_of, problem_of
from sward_kernels.windows import Shift, WindowGrid


def windowed_feature_distillation(
    tensors: api.Tensors, window_size: int, shift: Shift, terms: Terms, falls_back: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, attention, value, context)` as the reference computes them; only the loss carries a gradient.

    With `falls_back`, backward makes queries, keys and values and runs eager, with a warning, if its kernel cannot run.

    Raises:
        NotImplementedError: for a device, dtype or size that the kernels do not support, and where Triton cannot
            compile them.
    """
    refuse_forward_mode(*tensors)
    _require_support(tensors, window_size)
    features_student, features_teacher, weight_student, weight_teacher = tensors
    tensors = (features_student, features_teacher, weight_student.contiguous(), weight_teacher.contiguous())
    arguments = (window_size, *shift_arguments(shift), terms)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        loss, means = _WindowedFeatureDistillation.apply(*tensors, *arguments, falls_back)
    else:
        loss, means = _forward_operator(*(tensor.detach() for tensor in tensors), *arguments)
    _, attention, value, context = means.unbind()
    return loss, attention, value, context


def _require_support(tensors: api.Tensors, window_size: int) -> None:
    require_gpu(tensors[0])
    require_dtype(tensors[0])
    dtype, device = tensors[0].dtype, tensors[0].device
    *channels, dim = api.sizes_of(tensors)
    if not api.takes_features(*api.sizes_of(tensors), window_size, dtype, device):
        raise NotImplementedError(
            f"implementation='triton' takes windows of up to {api.MOST_TOKENS} tokens, D up to {api.MOST_DIM} and up "
            f"to {api.most_channels(torch.float16, device)} channels of 16 bits, got window_size={window_size}, "
            f"D={dim} and {max(channels)} channels of {dtype}; use windowed_distillation on projected maps"
        )


class _WindowedFeatureDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_student: Tensor,
        features_teacher: Tensor,
        weight_student: Tensor,
        weight_teacher: Tensor,
        window_size: int,
        offsets: tuple[int, int],
        shift: Tensor | None,
        terms: Terms,
        falls_back: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = (features_student, features_teacher, weight_student, weight_teacher)
        loss, means = _forward_operator(*(tensor.detach() for tensor in tensors), window_size, offsets, shift, terms)
        ctx.save_for_backward(*tensors, shift)
        ctx.arguments = (window_size, offsets, terms, falls_back)
        ctx.set_materialize_grads(False)  # else backward would allocate and fill zeros for the means
        ctx.mark_non_differentiable(means)
        return loss, means

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        features_student, features_teacher, weight_student, weight_teacher, shift = ctx.saved_tensors
        tensors = (features_student, features_teacher, weight_student, weight_teacher)
        window_size, offsets, terms, falls_back = ctx.arguments
        wanted = ctx.needs_input_grad[:4]
        sides = (wanted[0] or wanted[2], wanted[1] or wanted[3])
        try:
            gradients = _backward_operator(upstream, *tensors, window_size, offsets, shift, terms, *sides)
        except NotImplementedError as reason:
            if not falls_back:
                raise
            warn_once(f"windowed_feature_distillation makes queries, keys and values in memory: {reason}")
            at = offsets if shift is None else shift
            gradients = _eager_gradients(upstream, tensors, window_size, at, terms)
        return *(gradient if wants else None for gradient, wants in zip(gradients, wanted)), *(None for _ in range(5))


def _eager_gradients(
    upstream: Tensor, tensors: api.Tensors, window_size: int, shift: Shift, terms: Terms
) -> tuple[Tensor, ...]:
    student, teacher, weight_student, weight_teacher = (tensor.detach().requires_grad_() for tensor in tensors)
    leaves = (student, teacher, weight_student, weight_teacher)
    with torch.enable_grad():
        loss = api.projected(leaves, window_size, shift, terms, "eager").loss
        return torch.autograd.grad(loss, leaves, upstream)


# ------------------------------------------------------------------------------------------------------- the operators


@dataclass(frozen=True)
class _Call:
    """One pass of calls that differ in nothing but data, shift and upstream gradient."""

    launch: PreparedLaunch
    dtype: torch.dtype
    """Of sums."""
    layout: torch.memory_format
    """Of the gradient."""
    pixels: int


_calls: CallCache[_Call] = CallCache()


def _call(
    features_student: Tensor, features_teacher: Tensor, dim: int, window_size: int, terms: Terms, own: str | None
) -> _Call:
    float32 = features_student.dtype == torch.float32
    key = (
        *(features_student.shape, features_student.stride(), features_teacher.shape, features_teacher.stride()),
        *(features_student.dtype, features_student.device, dim, window_size, *terms, own),
        torch.backends.cuda.matmul.fp32_precision if float32 else "",
    )
    call = _calls.get(key)
    if call is None:
        problem = problem_of(features_student, features_teacher, dim, window_size, terms)
        maps = {"student": features_student, "teacher": features_teacher}
        call = _calls.keep(key, _prepared(problem, plan_of(problem, own), maps, terms, own))
    return call


def _prepared(problem: Problem, plan: Plan, maps: dict[str, Tensor], terms: Terms, own: str | None) -> _Call:
    batch, _, height, width = maps["student"].shape
    groups = batch * -(-WindowGrid(height, width, problem.window_size).windows // plan.windows_per_group)
    groups_per_program = -(-groups // plan.most_programs)
    if own:
        maps = {"own": maps[own], "other": maps[other_side(own)]}
    known = {
        **plan.constants,
        **known_arguments(maps, terms),
        "groups_total": groups,
        "groups_per_program": groups_per_program,
    }
    options = {"maxnreg": plan.tiles.max_registers} if plan.tiles.max_registers else {}
    programs = -(-groups // groups_per_program)
    launch = PreparedLaunch(problem, plan.kernel, programs, plan.tiles.num_warps, known, **options)
    features = next(iter(maps.values()))
    return _Call(launch, precision(features), memory_format(features), batch * height * width)


def _launch(prepared: PreparedLaunch, arguments: dict[str, Any]) -> None:
    prepared(arguments["partials"].device, arguments)


def _forward(
    features_student: Tensor,
    features_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    dim = weight_student.shape[0] // 3
    call = _call(features_student, features_teacher, dim, window_size, terms, None)
    partials = features_student.new_empty((call.launch.programs, 4), dtype=call.dtype)
    arguments = {
        "student": features_student,
        "teacher": features_teacher,
        "student_weight": weight_student,
        "teacher_weight": weight_teacher,
        "partials": partials,
        "shift": shift,
        "shift_y": offsets[0],
        "shift_x": offsets[1],
    }
    _launch(call.launch, arguments)
    sums = partials.sum(0)  # in a fixed order: bitwise repeatable, where atomics would not be
    return sums[0] / call.pixels, sums / call.pixels


def _forward_fake(
    features_student: Tensor,
    features_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    dtype = precision(features_student)
    return features_student.new_empty((), dtype=dtype), features_student.new_empty(4, dtype=dtype)


def _backward(
    upstream: Tensor,
    features_student: Tensor,
    features_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maps = {"student": features_student, "teacher": features_teacher}
    weights = {"student": weight_student, "teacher": weight_teacher}
    gradients: dict[str, tuple[Tensor, Tensor]] = {}
    for own, wanted in (("student", wants_student_gradient), ("teacher", wants_teacher_gradient)):
        weight = weights[own]
        if not wanted:
            gradients[own] = weight.new_empty(0), weight.new_empty(0)
            continue
        call = _call(features_student, features_teacher, len(weight) // 3, window_size, terms, own)
        gradient = torch.empty_like(maps[own], memory_format=call.layout)
        sums_per_program = weight.shape[1] ** 2 + weight.numel() // 3
        partials = gradient.new_empty((call.launch.programs, sums_per_program), dtype=call.dtype)
        arguments = {
            "own": maps[own],
            "other": maps[other_side(own)],
            "own_weight": weight,
            "other_weight": weights[other_side(own)],
            "upstream": upstream,
            "gradient": gradient,
            "partials": partials,
            "shift": shift,
            "shift_y": offsets[0],
            "shift_x": offsets[1],
        }
        _launch(call.launch, arguments)
        gradients[own] = gradient, _weight_gradient(partials.sum(0), weight, upstream / call.pixels)
    student, teacher = gradients["student"], gradients["teacher"]
    return student[0], teacher[0], student[1], teacher[1]


def _weight_gradient(sums: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """From dG and dWv: with `G = Wq^T Wk / sqrt(D)`, `dWq = Wk dG^T / sqrt(D)` and `dWk = Wq dG / sqrt(D)`."""
    dim, channels = weight.shape[0] // 3, weight.shape[1]
    sums = sums * scale
    dg, dv = sums[: channels**2].view(channels, channels), sums[channels**2 :].view(dim, channels)
    queries, keys, _ = weight.to(sums.dtype).chunk(3)
    dg = dg / dim**0.5
    return torch.cat([keys @ dg.T, queries @ dg, dv]).to(weight.dtype)


def _backward_fake(
    upstream: Tensor,
    features_student: Tensor,
    features_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        allocate_gradient(features_student, memory_format(features_student), wants_student_gradient),
        allocate_gradient(features_teacher, memory_format(features_teacher), wants_teacher_gradient),
        torch.empty_like(weight_student) if wants_student_gradient else weight_student.new_empty(0),
        torch.empty_like(weight_teacher) if wants_teacher_gradient else weight_teacher.new_empty(0),
    )


_forward_operator = register(
    "windowed_feature_distillation_triton_forward(Tensor features_student, Tensor features_teacher, "
    "Tensor weight_student, Tensor weight_teacher, SymInt window_size, SymInt[2] offsets, Tensor? shift, "
    "float[3] terms) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_operator = register(
    "windowed_feature_distillation_triton_backward(Tensor upstream, Tensor features_student, Tensor features_teacher, "
    "Tensor weight_student, Tensor weight_teacher, SymInt window_size, SymInt[2] offsets, Tensor? shift, "
    "float[3] terms, bool wants_student_gradient, bool wants_teacher_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
