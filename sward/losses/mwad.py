"""Multi-scale windowed attention distillation (MWAD), Eq. 1-15 of the paper."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward.alignment import ChannelProjection, Standardization, aligned_size, in_dtype_of, project, resize
from sward.losses.recipes import RECOMMENDED, ContextReduction, TeacherNormalization, TeacherProjections
from sward.losses.relation_health import relation_health
from sward_kernels import WindowedDistillation, windowed_distillation, windowed_feature_distillation
from sward_kernels.windowed.api import check_implementation, check_terms
from sward_kernels.windowed_features.api import projects_inside

ShiftStrategy = Literal["stochastic", "deterministic", "none"]
"""The three window strategies of Table 4."""


class MWADOutput(NamedTuple):
    """Result of `MWADLoss`."""

    loss: Tensor
    """fp32 scalar with gradient, the mean of the stage losses (Eq. 15)."""
    attention: Tensor
    """Mean over stages of the attention term (Eq. 11), detached and unweighted."""
    value: Tensor
    """The same for the value term (Eq. 12)."""
    context: Tensor
    """The same for the context term (Eq. 13)."""
    stages: tuple[WindowedDistillation, ...]
    """One result per stage, in the order of the features."""


class MWADLoss(nn.Module):
    """Match attention, values and contexts of student and teacher inside randomly shifted windows.

    Per stage: the teacher map is standardised per channel and goes through `phi` (1x1 convolution, Eq. 1), both maps
    are resized to their common grid (`psi`, Eq. 2-3), two bias-free 1x1 convolutions `Theta` give queries, keys and
    values (Eq. 8), and `sward_kernels.windowed_distillation` compares them window by window (Eq. 4-14). For few
    student channels, `Theta` is part of the Triton kernels and of the C++ (`windowed_feature_distillation`).

    The defaults are the recommended recipe. The paper's is `teacher_normalization="none"`,
    `teacher_projections="learned"`, `context_reduction="sum"`; see `sward.losses.recipes`.

    Args:
        student_channels: channels of the student's maps, one number per stage.
        teacher_channels: channels of the teacher's maps, in the same order.
        window_size: window side `M` in pixels of the aligned grid, one number or one per stage. Default 8.
        embed_dim: width `D` of queries, keys and values, one number or one per stage. Default 64.
        shift: `"stochastic"` draws a new offset per stage and call (Eq. 6), `"deterministic"` always takes half a
            window, `"none"` never shifts (Table 4). In `eval()` mode `"stochastic"` does not shift, so that evaluation
            is repeatable.
        terms: weights of the attention, value and context terms. The rows of Table 3 are `(1, 0, 0)`, `(1, 1, 0)` and
            `(1, 1, 1)`, the default. A term of weight 0 is not computed.
        teacher_normalization: `"standardize"` (default) gives every channel of the teacher's maps mean 0 and variance
            1 (`sward.alignment.Standardization`), `"none"` takes them as they are. Standardised before `phi` and the
            resize: the statistics are then the teacher's alone, whatever the student's grid, and come from as many
            positions as there are. Where they are applied makes no difference, since a bilinear resize keeps means.
        teacher_projections: `"frozen"` (default) keeps `phi` and the teacher's `Theta` at a semi-orthogonal start;
            `"learned"` trains them with the student, as in the paper.
        context_reduction: `"mean"` (default) over the `embed_dim` channels, or `"sum"` as Eq. 13 is written.
        process_group: processes over whose maps the standardisation takes its statistics. Default: this process alone.
        generator: source of the offsets. Default: torch's global generator of the features' device, the only one
            that `torch.compile` can trace without a graph break.
        implementation: passed to `sward_kernels.windowed_distillation` or `windowed_feature_distillation`.

    Examples:
        >>> import torch
        >>> from sward.losses import MWADLoss
        >>> mwad = MWADLoss(student_channels=(16, 32), teacher_channels=(96, 192), window_size=(8, 4), embed_dim=32)
        >>> student = [torch.randn(2, 16, 16, 16, requires_grad=True), torch.randn(2, 32, 8, 8, requires_grad=True)]
        >>> teacher = [torch.randn(2, 96, 16, 16), torch.randn(2, 192, 8, 8)]
        >>> out = mwad(student, teacher)
        >>> out.loss.backward()
        >>> tuple(student[0].grad.shape), len(out.stages)
        ((2, 16, 16, 16), 2)

    Shapes:
        student_features: list of `[B, C_s, H_s, W_s]`; teacher_features: list of `[B, C_t, H_t, W_t]`. Any floating
        dtype, which may differ from map to map: outside autocast, maps are computed in the dtype of this module's
        parameters, and a map's gradient has the map's dtype. Any strides. No gradient reaches the teacher's features.

    Raises:
        ValueError: for lists of different lengths, unknown options, `terms` that are not three finite numbers of at
            least 0, or (when called) features whose number or channels differ from those given here.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        window_size: int | Sequence[int] = 8,
        embed_dim: int | Sequence[int] = 64,
        shift: ShiftStrategy = "stochastic",
        terms: tuple[float, float, float] = (1.0, 1.0, 1.0),
        teacher_normalization: TeacherNormalization = RECOMMENDED.teacher_normalization,
        teacher_projections: TeacherProjections = RECOMMENDED.teacher_projections,
        context_reduction: ContextReduction = RECOMMENDED.context_reduction,
        process_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        for name, channels in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
            if isinstance(channels, int):
                raise ValueError(f"{name} must be a list, one per stage, got {channels}")
        if len(student_channels) != len(teacher_channels) or not student_channels:
            raise ValueError(
                "student_channels and teacher_channels must have the same number of stages, at least one, "
                f"got {len(student_channels)} and {len(teacher_channels)}"
            )
        _check_choice("shift", shift, get_args(ShiftStrategy))
        _check_choice("teacher_normalization", teacher_normalization, get_args(TeacherNormalization))
        _check_choice("teacher_projections", teacher_projections, get_args(TeacherProjections))
        _check_choice("context_reduction", context_reduction, get_args(ContextReduction))
        check_terms(terms)
        check_implementation(implementation)
        self.student_channels = tuple(student_channels)
        self.teacher_channels = tuple(teacher_channels)
        stages = len(self.student_channels)
        self.window_size = _one_per_stage("window_size", window_size, stages)
        self.embed_dim = _one_per_stage("embed_dim", embed_dim, stages)
        self.shift = shift
        self.terms = terms
        self.teacher_normalization = teacher_normalization
        self.teacher_projections = teacher_projections
        self.context_reduction = context_reduction
        self.generator = generator
        self.implementation = implementation

        self.phi = nn.ModuleList(
            ChannelProjection(teacher, student)
            for teacher, student in zip(self.teacher_channels, self.student_channels)
        )
        self.theta_teacher = nn.ModuleList(
            ChannelProjection(channels, 3 * dim, bias=False)
            for channels, dim in zip(self.student_channels, self.embed_dim)
        )
        self.theta_student = nn.ModuleList(
            ChannelProjection(channels, 3 * dim, bias=False)
            for channels, dim in zip(self.student_channels, self.embed_dim)
        )
        self.standardization = nn.ModuleList(
            Standardization(channels, process_group=process_group)
            for channels in (self.teacher_channels if teacher_normalization == "standardize" else ())
        )
        self._padded_stages: set[int] = set()
        self._warned_without_gradient = False
        if teacher_projections == "frozen":
            self._freeze_teacher_projections()

    def forward(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> MWADOutput:
        """Compare the maps of one batch; see the class for shapes."""
        self._check_features("student_features", student_features, self.student_channels)
        self._check_features("teacher_features", teacher_features, self.teacher_channels)
        if self.teacher_projections == "frozen":
            self._keep_frozen()
        if self.training and not torch.compiler.is_compiling():
            self._warn_without_gradient(student_features)
        stages = tuple(
            self._stage(index, student, teacher.detach())
            for index, (student, teacher) in enumerate(zip(student_features, teacher_features))
        )
        return MWADOutput(
            loss=torch.stack([stage.loss for stage in stages]).mean(),
            attention=torch.stack([stage.attention for stage in stages]).mean(),
            value=torch.stack([stage.value for stage in stages]).mean(),
            context=torch.stack([stage.context for stage in stages]).mean(),
            stages=stages,
        )

    def project(self, index: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stacked queries, keys and values of one stage (Eq. 1-3 and 8).

        Args:
            index: stage, from 0.
            student: `[B, C_s, H_s, W_s]`.
            teacher: `[B, C_t, H_t, W_t]`.

        Returns:
            The student's and the teacher's `[B, 3 * embed_dim, min H, min W]`.
        """
        size = aligned_size(student, teacher)
        theta = cast(ChannelProjection, self.theta_student[index])
        qkv_student = theta.project_and_resize(_in_relation_layout(student, self.embed_dim[index]), size)
        return qkv_student, self._project_teacher(index, teacher, size)

    @torch.no_grad()
    def diagnostics(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Measure per stage and side whether the projections still carry a relation worth matching.

        A pair of projections can lower its loss by collapsing: all values point in one direction, or attention is
        uniform. Then `value_rank` falls towards 1, and `value_cosine` or `attention_entropy` rises towards 1.

        Args:
            student_features: as for `forward`.
            teacher_features: as for `forward`.

        Returns:
            `stage0/student/value_rank`, `.../value_cosine`, `.../attention_entropy`, the same for `teacher` and the
            other stages: fp32 scalars, see `sward.losses.relation_health`. Windows are not shifted.
        """
        health: dict[str, Tensor] = {}
        for index, (student, teacher) in enumerate(zip(student_features, teacher_features)):
            for side, qkv in zip(("student", "teacher"), self.project(index, student, teacher)):
                for name, value in relation_health(qkv, self.window_size[index])._asdict().items():
                    health[f"stage{index}/{side}/{name}"] = value
        return health

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, embed_dim={self.embed_dim}, shift={self.shift!r}, "
            f"terms={self.terms}, teacher_normalization={self.teacher_normalization!r}, "
            f"teacher_projections={self.teacher_projections!r}"
        )

    def _stage(self, index: int, student: Tensor, teacher: Tensor) -> WindowedDistillation:
        if self.training and self.standardization:
            cast(Standardization, self.standardization[index]).update(teacher)
        attention, value, context = self.terms
        # The operation sums over channels, as in Eq. 13; a mean is that sum with a smaller weight.
        scale = 1.0 / self.embed_dim[index] if self.context_reduction == "mean" else 1.0
        if not torch.compiler.is_compiling():
            self._warn_of_padding(index, *aligned_size(student, teacher))
        compare, maps = self._operation(index, student, teacher)
        result = compare(
            *maps,
            window_size=self.window_size[index],
            shift=self._draw_shift(self.window_size[index], student.device),
            terms=(attention, value, context * scale),
            implementation=self.implementation,
        )
        return result._replace(context=result.context * scale)

    def _operation(
        self, index: int, student: Tensor, teacher: Tensor
    ) -> tuple[Callable[..., WindowedDistillation], tuple[Tensor, ...]]:
        """The operation that compares one stage, and the maps that it takes."""
        theta_student = cast(ChannelProjection, self.theta_student[index]).weight.flatten(1)
        theta_teacher = cast(ChannelProjection, self.theta_teacher[index]).weight.flatten(1)
        channels, dim, window_size = self.student_channels[index], self.embed_dim[index], self.window_size[index]
        device, dtype = student.device, theta_student.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        if not projects_inside(self.implementation, channels, channels, dim, window_size, dtype, device):
            return windowed_distillation, self.project(index, student, teacher)
        # Theta is part of the kernels, which read C channels in place of 3 D.
        size = aligned_size(student, teacher)
        features_student = in_dtype_of(theta_student, resize(student, size))
        features_teacher = self.phi[index](self._normalized(index, teacher, size))
        return windowed_feature_distillation, (features_student, features_teacher, theta_student, theta_teacher)

    def _normalized(self, index: int, teacher: Tensor, size: tuple[int, int]) -> Tensor:
        if self.standardization:
            return cast(Standardization, self.standardization[index]).normalize(teacher, size)
        return resize(teacher, size)

    def _project_teacher(self, index: int, teacher: Tensor, size: tuple[int, int]) -> Tensor:
        phi = cast(ChannelProjection, self.phi[index])
        theta = cast(ChannelProjection, self.theta_teacher[index])
        features = self._normalized(index, teacher, size)
        pixels = features.shape[0] * features.shape[-2] * features.shape[-1]
        teacher_channels, student_channels, width = phi.in_channels, phi.out_channels, theta.out_channels
        one_by_one = pixels * student_channels * (teacher_channels + width)
        merged = (pixels + student_channels) * teacher_channels * width
        if merged < one_by_one:
            # Theta after phi is one linear map; where the student is wide, applying it in one step is far cheaper.
            theta_matrix, phi_matrix = theta.weight.flatten(1), phi.weight.flatten(1)
            weight = theta_matrix @ phi_matrix
            assert phi.bias is not None
            return project(features, weight, theta_matrix @ phi.bias)
        return theta(_in_relation_layout(phi(features), self.embed_dim[index]))

    def _warn_of_padding(self, index: int, height: int, width: int) -> None:
        window = self.window_size[index]
        padded = -(-height // window) * -(-width // window) * window**2
        if 2 * height * width >= padded or index in self._padded_stages:
            return
        self._padded_stages.add(index)
        warnings.warn(
            f"{1 - height * width / padded:.0%} of the tokens of MWAD's stage {index} are padding: its aligned grid is "
            f"{height}x{width} and its windows {window}x{window}; use smaller windows there "
            "(window_size, on the command line --sward.window-size, takes one number per stage), larger images, or a "
            "teacher with more tokens",
            stacklevel=2,
        )

    def _draw_shift(self, window_size: int, device: torch.device) -> tuple[int, int] | Tensor:
        if self.shift == "none" or (self.shift == "stochastic" and not self.training):
            return (0, 0)
        if self.shift == "deterministic":
            return (window_size // 2, window_size // 2)
        source = device if self.generator is None else self.generator.device
        offsets = torch.randint(window_size, (2,), generator=self.generator, device=source)
        if source.type == device.type:
            # Kept on the device: no host synchronisation, and a CUDA graph replays with new offsets.
            return offsets
        dy, dx = offsets.tolist()
        return (dy, dx)

    def _freeze_teacher_projections(self) -> None:
        for projection in (*self.phi, *self.theta_teacher):
            nn.init.orthogonal_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
            projection.requires_grad_(False)

    def _warn_without_gradient(self, features: Sequence[Tensor]) -> None:
        if self._warned_without_gradient or not torch.is_grad_enabled() or any(each.requires_grad for each in features):
            return
        self._warned_without_gradient = True
        warnings.warn(
            "no map in student_features has a gradient, so the student learns nothing from MWAD; tap it without "
            "detach=True and outside of torch.no_grad()",
            stacklevel=3,
        )

    def _keep_frozen(self) -> None:
        # Who thaws a whole trainer, as after a warm-up, does not mean these: learned, they collapse.
        for projection in (*self.phi, *self.theta_teacher):
            for parameter in projection.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)

    def _check_features(self, name: str, features: Sequence[Tensor], channels: tuple[int, ...]) -> None:
        if isinstance(features, Tensor) or not isinstance(features, Sequence):
            raise ValueError(
                f"{name} must be a list of maps, one per stage, got {type(features).__name__}; of what "
                "FeatureTaps.collect() returns, take list(maps.values())"
            )
        if len(features) != len(channels):
            raise ValueError(f"{name} must hold {len(channels)} maps, one per stage, got {len(features)}")
        for index, (feature, expected) in enumerate(zip(features, channels)):
            if feature.dim() != 4 or feature.shape[1] != expected:
                raise ValueError(
                    f"{name}[{index}] must be [B, {expected}, H, W] as given at construction, "
                    f"got shape {tuple(feature.shape)}"
                )


def _one_per_stage(name: str, value: int | Sequence[int], stages: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, int) for each in given):
        raise ValueError(f"{name} must be a whole number or a list of them, one per stage, got {value!r}")
    values = (value,) * stages if isinstance(value, int) else tuple(value)
    if len(values) != stages:
        raise ValueError(f"{name} must be one number or one per stage ({stages}), got {len(values)} numbers")
    if any(number < 1 for number in values):
        raise ValueError(f"{name} must be at least 1, got {value}")
    return values


def _in_relation_layout(features: Tensor, embed_dim: int) -> Tensor:
    """Features from which `Theta` makes queries, keys and values in the layout that the operation reads fastest.

    On a GPU that is channels_last, and `Theta` keeps the layout of its input. To copy up to `embed_dim` channels
    costs at most half of what the kernels save with `3 * embed_dim` of them: an estimate from counted bytes and
    simulated cycles (docs/kernels.md), not a measurement. On a CPU the kernels read every layout in place.
    """
    if features.is_cpu or features.shape[1] > embed_dim:
        return features
    return features.contiguous(memory_format=torch.channels_last)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
