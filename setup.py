"""Packages, extras and the console script. No hardware is probed: a wheel must not depend on where it was built."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="contentv",
    version="0.1.0",
    description="Train text-to-video diffusion transformers: image reuse, low-res video, high-res video, SFT, RLHF",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["contentv", "contentv.*"]), *find_packages("kernels"), "contentv._conf"],
    package_dir={"contentv_kernels": "kernels/contentv_kernels", "contentv._conf": "conf"},
    package_data={
        "contentv": ["py.typed", "demo/assets/**/*"],
        "contentv_kernels": ["py.typed"],
        "contentv._conf": ["*.yaml", "*/*.yaml"],
    },
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19,<0.20",  # engine/partitioner.py overrides one of its methods
        "diffusers>=0.36",
        "transformers>=4.57",
        "peft>=0.17",
        "accelerate>=1.0",
        "safetensors>=0.5",
        "webdataset>=1.0",
        "httpx>=0.27",
        "fsspec[http]>=2024.2",  # datasets behind a URL; small, and already there as torch's own requirement
        "hydra-core>=1.3",
        "jaxtyping>=0.3",
        "msgspec>=0.18",
        "numpy>=1.26",
        "scipy>=1.11",
        "xxhash>=3.4",
        "av>=14",
        "opencv-python-headless>=4.10",
        "scenedetect-headless>=0.7",  # scenedetect itself brings the OpenCV that needs X libraries, which servers lack
        "pillow>=10",
        "rich>=13",
        "pyyaml>=6",
    ],
    extras_require={
        # flash-attn and NVIDIA's apex are built from source in the Dockerfile: the registry's `apex` is something else.
        "gpu": ["triton>=3.0"],
        "npu": ["torch_npu"],
        "curation": ["pyarrow>=15", "ray>=2.30"],
        "storage": ["gcsfs>=2024.2", "s3fs>=2024.2"],  # datasets in Google Cloud and S3; large, hence not for everybody
        "wandb": ["wandb>=0.17"],
        "tensorboard": ["tensorboard>=2.15"],
        "dev": [
            "beartype==0.23.1",
            "hypothesis",
            "import-linter==2.16",
            "mypy==2.4.1",
            "pre-commit==4.7.0",
            "pyarrow>=15",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ray>=2.30",
            "ruff==0.17.5",
            "tensorboard>=2.15",
            "types-PyYAML",
            "triton>=3.0; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "wandb>=0.17",
        ],
    },
    entry_points={"console_scripts": ["contentv = contentv.cli.main:main"]},
)
