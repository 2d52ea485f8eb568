"""Package metadata of sward and sward_kernels."""

from pathlib import Path

from setuptools import find_packages, setup

MODELS = ["torchvision", "timm>=1.0.20", "segmentation-models-pytorch>=0.5", "sam2==1.1.0"]
COMMAND_LINE = ["tyro>=0.9", "rich>=13", "pillow>=10"]
FIGURES = ["matplotlib>=3.8", "scikit-learn>=1.4"]
DEVELOPMENT = [
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "mypy>=1.11",
    "torchmetrics>=1.4",
    "ptflops>=0.7.5",
    "coverage>=7",
]

setup(
    name="sward",
    version="0.1.0",
    description="Distil SAM 2.1 and other vision transformers into small segmentation networks (SWARD)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["sward", "sward.*", "sward_kernels", "sward_kernels.*"]),
    package_data={"sward": ["py.typed"], "sward.data": ["splits/*"], "sward_kernels": ["py.typed", "*/*.cpp", "*/*.h"]},
    # torch brings triton on Linux x86-64; nothing here names it for machines where it does not exist.
    install_requires=[
        "torch>=2.9",
        "numpy>=1.26",
        "triton>=3.5; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
    extras_require={
        "models": MODELS + COMMAND_LINE,
        "figures": FIGURES,
        "dev": DEVELOPMENT,
        "all": MODELS + COMMAND_LINE + FIGURES + DEVELOPMENT,
    },
    entry_points={"console_scripts": ["sward=sward.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
