"""What the zoo does not pass, with the cause. Whatever is listed here and passes all the same fails the suite."""

from __future__ import annotations

POOLS = "pools the words into one vector, which is added to no stream"

OUTSIDE: dict[str, dict[str, str]] = {
    "HunyuanDiT2DModel": {"time_extra_emb.pooler": POOLS},
    "MochiTransformer3DModel": {"time_embed.pooler": POOLS},
}
"""Model -> module path of an attention that no branch holds -> why."""

IN_PYTHON = "experts are counted in numpy, so its MoE runs in Python, which a file cannot hold"
BFLOAT16 = (
    "its linear attention is in bfloat16, for which ONNX Runtime has no Mul on a CPU; compute it in float32 there"
)

FAILING: dict[str, dict[str, str]] = {
    "HiDreamImageTransformer2DModel": {
        "onnx": IN_PYTHON,
        "sizes": IN_PYTHON,
    },
    "SanaWMTransformer3DModel": {
        "onnx": BFLOAT16,
        "sizes": BFLOAT16,
    },
}
"""Model -> check -> why it fails. A model that is not captured is asked nothing else."""
