"""What pyproject.toml cannot say yet: the scoring loops in C, left out where there is no compiler."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        # Not a module to import but a plain shared library, so Python's headers are not needed.
        Extension(
            "app.ai._score_kernels",
            sources=["app/ai/_score_kernels.c"],
            # No fused multiply-add: the sums must have scikit-learn's bits on every processor.
            extra_compile_args=["-std=c99", "-O3", "-ffp-contract=off"],
            optional=True,
        )
    ]
)
