"""The layers that are distilled by default."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward import models
from sward.layers import choose, default_layers, paired, survey


class UNet(nn.Module):
    """Unnamed stages of strides 2, 4 and 8, then back up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = (
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.Conv2d(4, 6, 3, 2, 1),
            nn.Conv2d(6, 8, 3, 2, 1),
        )
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.up = nn.Conv2d(14, 6, 3, 1, 1)
        self.classifier = nn.Conv2d(6, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        middle = self.down2(self.down1(images))
        deep = F.interpolate(self.deep(self.down3(middle)), scale_factor=2)
        return self.classifier(self.up(torch.cat([deep, middle], dim=1)))


class PlainTransformer(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.new_zeros(len(tokens), 1, 8), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


def test_the_encoder_ends_where_the_resolution_rises_again() -> None:
    choice = choose(UNet(), (64, 96))
    assert choice.stages == ("down1", "down2", "deep")
    assert choice.deepest == "deep"
    assert choice.penultimate == "up"


@pytest.mark.parametrize(("blocks", "chosen"), [(12, (2, 5, 8, 11)), (4, (0, 1, 2, 3)), (6, (1, 2, 3, 5)), (2, (0, 1))])
def test_a_plain_transformer_gives_evenly_spaced_blocks(blocks: int, chosen: tuple[int, ...]) -> None:
    assert choose(PlainTransformer(blocks), (64, 64)).stages == tuple(f"blocks.{index}" for index in chosen)


class Segmenter(nn.Module):
    """A plain transformer whose head reads a view of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.head = PlainTransformer(4), nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        grid = (images.shape[-2] // 8, images.shape[-1] // 8)
        maps = self.vit(images)[:, 1:].transpose(1, 2).unflatten(2, grid)
        return F.interpolate(self.head(maps), images.shape[-2:])


class Wrapped(nn.Module):
    """A network behind the normalisation that it expects."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - 0.5) / 0.5)


@pytest.mark.parametrize("wrappers", [0, 1, 2])
def test_a_wrapper_around_a_network_changes_no_choice(wrappers: int) -> None:
    for network, stages in (
        (Segmenter(), [f"vit.blocks.{index}" for index in range(4)]),
        (UNet(), ["down1", "down2", "deep"]),
    ):
        for _ in range(wrappers):
            network = Wrapped(network)
        chosen = choose(network, (64, 96), num_classes=3)
        assert chosen.stages == tuple("network." * wrappers + stage for stage in stages)
        # Without a head, the last block is the deepest map.
    assert choose(Wrapped(PlainTransformer(4)), (64, 64)).deepest == "network.blocks.3"


def test_the_logits_are_no_stage_of_the_encoder() -> None:
    """A classifier at the stride of the deepest stage, inside a network that is wrapped, as those of a user are."""
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in ((3, 4), (4, 6), (6, 8))]
    network = nn.Sequential(OrderedDict(inner=nn.Sequential(*stages, nn.Conv2d(8, 2, 1))))
    assert choose(network, (64, 64)).stages[-1] == "inner.3"
    choice = choose(network, (64, 64), num_classes=2)
    assert choice.stages == ("inner.0", "inner.1", "inner.2")
    assert (choice.deepest, choice.penultimate) == ("inner.2", "inner.2")
    alone = nn.Sequential(nn.Conv2d(3, 2, 1))
    assert choose(alone, (64, 64), num_classes=2).stages == ("0",)


class Resizing(nn.Module):
    """Ends in a module behind the classifier, whose input is a temporary."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 1, 1)
        self.classifier, self.resize = nn.Conv2d(6, 3, 1), nn.Upsample(scale_factor=2)

    def forward(self, images: Tensor) -> Tensor:
        return self.resize(self.classifier(F.relu(self.up(F.relu(self.down(images))))))


def test_a_module_behind_the_classifier_is_not_what_enters_it() -> None:
    for _ in range(5):
        choice = choose(Resizing(), (64, 96), num_classes=3)
        assert choice.penultimate not in ("resize", "classifier")


def test_the_survey_reads_shapes_off() -> None:
    rows = {layer.name: layer for layer in survey(UNet(), (64, 96))}
    assert list(rows) == ["down1", "down2", "down3", "deep.0", "deep.1", "deep", "up", "classifier"]
    assert (rows["deep"].channels, rows["deep"].stride, rows["deep"].grid) == (8, 8, (8, 12))
    assert rows["deep"].parameters == 8 * 8 * 9 + 8
    assert survey(PlainTransformer(1), (64, 96))[1].format == "tokens"


def test_a_layer_that_an_in_place_activation_overwrites_is_left_out() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 1))
    assert [layer.name for layer in survey(network, (32, 32))] == ["1", "2"]


@pytest.mark.parametrize("name", ["unext", "hiera_demo"])
def test_the_choice_is_the_registrys_where_stages_and_strides_agree(name: str) -> None:
    network = models.build(name, 3)
    assert choose(network, (64, 64)) == default_layers(name, network, (64, 64))


def test_networks_with_fewer_stages_are_paired_from_the_deepest() -> None:
    assert paired(("a", "b", "c"), ("1", "2")) == (("b", "c"), ("1", "2"))


def test_named_layers_all_stay() -> None:
    assert paired(("a",), ("1", "2", "3"), student_named=True) == (("a",), ("3",))
    assert paired(("a", "b"), ("1", "2"), student_named=True, teacher_named=True) == (("a", "b"), ("1", "2"))
    assert paired(("a", "b", "c"), ("1", "2"), teacher_named=True) == (("b", "c"), ("1", "2"))
    with pytest.raises(ValueError, match=r"teacher_layers must be named too, 3 as for .* the teacher has 2 stages"):
        paired(("a", "b", "c"), ("1", "2"), student_named=True)


def test_an_image_that_the_network_refuses_is_named() -> None:
    with pytest.raises(ValueError, match="image_size must be a size that UNeXt accepts, got 30x30"):
        choose(models.build("unext", 2), (30, 30))
