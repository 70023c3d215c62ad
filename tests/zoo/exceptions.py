"""What the zoo does not pass, with the cause. Whatever is listed here and passes all the same fails the suite."""

from __future__ import annotations

OUTSIDE: dict[str, dict[str, str]] = {
    "HunyuanDiT2DModel": {"time_extra_emb.pooler": "pools the words into one vector, which is added to no stream"},
}
"""Model -> module path of an attention that no branch holds -> why."""

FAILING: dict[str, dict[str, str]] = {
    "Cosmos3OmniTransformer": {
        "gradients": "the model computes an MLP over the words in its last block whose result it does not return",
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "onnx": "the words are cut to a length that is read from the mask (item()), so that sizes depend on values",
    },
    "HiDreamImageTransformer2DModel": {
        "captures": "experts are counted in numpy: a decision in Python by values computed with the weights",
    },
}
"""Model -> check -> why it fails. A model that is not captured is asked nothing else."""
