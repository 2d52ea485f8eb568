"""What the Triton kernels of several operations, and the functions that launch them, share."""
