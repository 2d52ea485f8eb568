"""Fused operations behind the losses of `sward`."""
