"""Small, real models that are trained on the spot, so that every claim can be checked without a download.

The command line takes them by name: ``lazy-compile inspect lazy_compile.demo:model``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

    from lazy_compile.bench.tasks.digits import DigitsSampler

ROWS = 16


def model() -> tuple[DiTTransformer2DModel, dict[str, Any]]:
    """The trained digits model, and a call of :data:`ROWS` rows."""
    from lazy_compile.bench.tasks.digits import example_inputs, load_or_train_digits_dit
    from lazy_compile.bench.tasks.training import default_checkpoints

    return load_or_train_digits_dit(default_checkpoints("digits") / "digits_dit.safetensors"), example_inputs(ROWS)


def sampler(steps: int = 20) -> DigitsSampler:
    """Draws digits with classifier-free guidance: two rows an image."""
    from lazy_compile.demo.comparison import DemoSettings

    return DemoSettings().sampler(ROWS // 2, steps)
