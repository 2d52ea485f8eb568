"""Colour changes in C++ against torchvision, bit for bit."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from sward_kernels.colours import native

pytestmark = pytest.mark.skipif(
    native.LIBRARY.why_not() is not None or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="needs a C++ compiler, and a processor on which PyTorch fuses products and sums",
)
CHANGES = {
    "brightness": (native.adjust_brightness_, functional.adjust_brightness),
    "contrast": (native.adjust_contrast_, functional.adjust_contrast),
    "saturation": (native.adjust_saturation_, functional.adjust_saturation),
    "hue": (native.adjust_hue_, functional.adjust_hue),
}


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, 67, 83), generator=generator, dtype=torch.uint8)
    # Every colour of a coarse cube, grey ones and those with two equal channels included.
    levels = torch.tensor([0, 1, 2, 31, 64, 127, 128, 200, 254, 255], dtype=torch.uint8)
    cube = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).flatten(2)
    return [noise, cube, torch.full((3, 1, 1), 255, dtype=torch.uint8), (noise // 64 * 80)[:, :5, :3].contiguous()]


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_bits_as_torchvision(name: str) -> None:
    change, reference = CHANGES[name]
    generator = torch.Generator().manual_seed(1)
    draws = (torch.rand(40, generator=generator) - 0.5).tolist()
    for draw in (0.0, *draws):
        factor = draw * 0.2 if name == "hue" else 1 + draw
        for image in images():
            assert native.serves(image)
            changed = image.clone()
            change(changed, factor)
            assert torch.equal(changed, reference(image, factor)), factor


def test_other_images_are_left_to_torchvision() -> None:
    image = images()[0]
    assert not any(native.serves(each) for each in (image.float(), image[:1], image.mT, image[:, :0], image[None]))
