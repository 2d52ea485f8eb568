"""Taps on named layers."""

import pytest
import torch
from torch import nn

from sward.features import FeatureTaps


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 5, 3)), nn.Flatten())


def test_catches_what_each_layer_returned_with_gradient() -> None:
    net, images = network(), torch.randn(2, 3, 8, 8)
    with FeatureTaps(net, ["2.0", "0"]) as taps:
        net(images)
        caught = taps.collect()
    assert list(caught) == ["2.0", "0"]
    torch.testing.assert_close(caught["0"], net[0](images))
    caught["2.0"].sum().backward()
    assert net[0].weight.grad is not None


def test_detached_taps_carry_no_gradient() -> None:
    net = network()
    with FeatureTaps(net, ["0"], detach=True) as taps:
        net(torch.randn(1, 3, 8, 8))
        assert not taps.collect()["0"].requires_grad


def test_hooks_are_gone_after_exit_even_when_the_body_raises() -> None:
    net = network()
    with pytest.raises(KeyError), FeatureTaps(net, ["0", "2"]):
        raise KeyError
    assert not any(module._forward_hooks for module in net.modules())


def test_opening_twice_installs_one_hook() -> None:
    net = network()
    with FeatureTaps(net, ["0"]) as taps:
        taps.open()
        assert len(net[0]._forward_hooks) == 1


def test_nothing_of_an_earlier_pass_is_handed_out_again() -> None:
    net = network()
    with FeatureTaps(net, ["0"]) as taps:
        net(torch.randn(1, 3, 8, 8))
        taps.collect()
        with pytest.raises(RuntimeError, match="'0' has produced no output since the last collect"):
            taps.collect()


def test_unknown_layer_names_near_matches() -> None:
    with pytest.raises(ValueError, match=r"layer '2\.1' does not exist in Sequential; did you mean one of .*'2\.0'"):
        FeatureTaps(network(), ["2.1"])


def test_a_layer_that_returns_no_map_is_named() -> None:
    net = network()
    with FeatureTaps(net, ["3"]), pytest.raises(ValueError, match=r"layer '3' must return a \[B, C, H, W\] tensor"):
        net(torch.randn(1, 3, 8, 8))
