"""What pyproject.toml cannot say yet: the scoring loops in C, left out where there is no compiler."""

from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "app/ai/_score_kernels.c"

setup(
    ext_modules=[
        # Not a module to import but a plain shared library, so Python's headers are not needed.
        Extension(
            "app.ai._score_kernels",
            sources=[SOURCE],
            # What was compiled: the library is used beside this source and no other.
            define_macros=[("SOURCE_SHA256", f'"{sha256(Path(SOURCE).read_bytes()).hexdigest()}"')],
            # No fused multiply-add: the sums must have scikit-learn's bits on every processor.
            extra_compile_args=["-std=c99", "-O3", "-ffp-contract=off"],
            optional=True,
        )
    ]
)
