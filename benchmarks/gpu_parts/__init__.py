"""The parts of `gpu_suite.py`: what each checks, times or counts."""
