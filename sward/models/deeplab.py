"""DeepLabV3+ students on MobileNetV3-Small with output stride 16."""

from __future__ import annotations

from torch import Tensor, nn

from sward.alignment import resize
from sward.models.heads import DeepLabV3PlusHead
from sward.models.inputs import check_images


class MobileNetV3DeepLabV3Plus(nn.Module):
    """DeepLabV3+ with its standard decoder on torchvision's MobileNetV3-Small: 3.3076 M parameters for 19 classes.

    Separable ASPP (rates 6, 12, 18) on the 576 channels at stride 16, a low-level map of 16 channels at stride 4, and
    two plain 3x3 convolutions. The paper does not publish its head; this one is within 0.3 % of its 3.30 M parameters.

    `encoder.1`, `encoder.3`, `encoder.8` and `encoder.12` return 16, 24, 48 and 576 channels at strides 4, 8, 16 and
    16.

    Args:
        num_classes: K, channels of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v3_small

        # `dilated` keeps the last three blocks at stride 16, as in torchvision's segmentation models.
        self.encoder = mobilenet_v3_small(weights=None, dilated=True).features
        self.head = DeepLabV3PlusHead((16, 576), num_classes, separable=True)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, H, W]` to logits `[B, K, H, W]`; raise ValueError if H or W is not a multiple of 32."""
        check_images(images)
        low_level = self.encoder[:2](images)
        return resize(self.head([low_level, self.encoder[2:](low_level)]), images.shape[-2:])


class SMPDeepLabV3Plus(nn.Module):
    """`segmentation_models_pytorch.DeepLabV3Plus` with timm's MobileNetV3-Small: 2.1658 M parameters for 19 classes.

    `network.encoder.model.blocks.{0,1,3,5}` return 16, 24, 48 and 576 channels at strides 4, 8, 16 and 16.

    Args:
        num_classes: K, channels of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        # smp downloads ImageNet weights unless `encoder_weights` is None.
        self.network = smp.DeepLabV3Plus("tu-mobilenetv3_small_100", encoder_weights=None, classes=num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, H, W]` to logits `[B, K, H, W]`; raise ValueError if H or W is not a multiple of 32."""
        check_images(images)
        return self.network(images)
