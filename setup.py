"""Builds the distribution `sward`, which holds the packages `sward` and `sward_kernels`.

Everything it needs to know stands in `pyproject.toml`.
"""

from setuptools import setup

setup()
