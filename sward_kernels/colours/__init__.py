"""Changes of brightness, contrast, saturation and hue of 8-bit images."""
