"""Text to image of emoji: a PixArt over 64x64 pixels, flow matching, 256 tokens with cross-attention to a caption.

The model is diffusers' own `PixArtTransformer2DModel` (Chen et al., 2023, "PixArt-alpha": adaLN-single), trained on the
pictures of `emoji_data` and sampled by Euler steps with classifier-free guidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lazy_compile.bench.tasks.flow import FlowSolver, flow_schedule, sample_flow
from lazy_compile.bench.tasks.training import load_checkpoint, seeded, set_to_zero
from lazy_compile.errors import ArtifactError, import_optional
from lazy_compile.storage import load_tensors, parse_json, save_tensors

if TYPE_CHECKING:
    from diffusers import PixArtTransformer2DModel

SIZE = 64
TOKENS = 16
"""Tokens of a caption at most, the two that mark its ends among them."""
CAPTION_CHANNELS = 384
WHERE_WEIGHTS_ARE = (
    "a checkout has it in examples/emoji, packages leave its 18 MB out; put that file there, or train it with "
    "examples/emoji/train.py, which takes hours"
)
STRIDE = 121
"""Captions from one row of a sample to the next; it shares no factor with their number, so all come up in turn."""


@dataclass(frozen=True)
class Captions:
    """Captions of the pictures and, last, the empty one.

    Attributes:
        texts: one a picture, sorted, then ``""``.
        states: of their tokens, ``float[N + 1, TOKENS, 384]``, zero after the last one of a caption.
        mask: ``bool[N + 1, TOKENS]``, where there are tokens.
    """

    texts: tuple[str, ...]
    states: Tensor
    mask: Tensor

    def conditions(self, rows: Tensor) -> dict[str, Tensor]:
        """Arguments of a denoiser: these captions, then the empty one as often."""
        both = torch.cat([rows, torch.full_like(rows, len(self.texts) - 1)])
        return {"encoder_hidden_states": self.states[both], "encoder_attention_mask": self.mask[both]}

    def save(self, path: Path) -> None:
        """Write the states in half precision, without what lies after the last token."""
        tensors = {"states": self.states[self.mask].half(), "lengths": self.mask.sum(1)}
        save_tensors(path, tensors, {"captions": json.dumps(self.texts, ensure_ascii=False)})

    @classmethod
    def load(cls, path: Path) -> Captions:
        """What `save` wrote; anything else is an `ArtifactError`."""
        tensors, metadata = load_tensors(path)
        texts = parse_json(metadata.get("captions", "null"), path)
        lengths, states = tensors.get("lengths"), tensors.get("states")
        if not isinstance(texts, list) or lengths is None or states is None:
            raise ArtifactError(f"{path} holds no captions: expected `states`, `lengths` and a list `captions`")
        if len(texts) != len(lengths) or int(lengths.sum()) != len(states) or int(lengths.max()) > TOKENS:
            raise ArtifactError(
                f"{path}: {len(texts)} captions, {len(lengths)} lengths and {len(states)} tokens do not belong together"
            )
        mask = torch.arange(TOKENS) < lengths[:, None]
        padded = torch.zeros(*mask.shape, CAPTION_CHANNELS)
        padded[mask] = states.float()
        return cls(tuple(texts), padded, mask)


def build_emoji_pixart(seed: int = 0) -> PixArtTransformer2DModel:
    """An untrained PixArt: 8 blocks, 4 heads, 256 tokens of width 256, 9.4 M parameters, eval mode.

    Every block starts as the identity by its output projections, and with gates of 1.
    """
    diffusers = import_optional("diffusers", "demo")
    model: PixArtTransformer2DModel = seeded(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=SIZE,
            patch_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=8,
            num_attention_heads=4,
            attention_head_dim=64,
            cross_attention_dim=256,
            caption_channels=CAPTION_CHANNELS,
        ),
        seed,
    )
    blocks = model.transformer_blocks
    outputs = [layer for block in blocks for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2])]
    set_to_zero([*outputs, model.adaln_single.linear, model.proj_out])
    for block in blocks:  # rows: shift, scale and gate of the self-attention, then of the MLP
        gates = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[:, None]
        block.scale_shift_table = nn.Parameter(gates.repeat(1, block.scale_shift_table.shape[1]))
    nn.init.zeros_(model.scale_shift_table)
    return model


def load_emoji_pixart(path: Path) -> PixArtTransformer2DModel:
    """The trained model.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    if not path.exists():
        raise ArtifactError(f"no emoji model at {path}; {WHERE_WEIGHTS_ARE}")
    model = build_emoji_pixart()
    load_checkpoint(model, path)
    return model


@dataclass(frozen=True)
class EmojiSampler:
    """Classifier-free-guided steps of Euler or DPM-Solver++ 2M over the flow, guided and unguided rows in one batch.

    A seed fixes the initial noise and the captions, whatever the denoiser and the number of steps.

    Attributes:
        captions: to choose from.
        steps, guidance_scale, solver: of the sampling.
        batch: images, unless a call says how many.
        shift: of the noise levels, for larger pictures.
        stride: captions from one row to the next; 1 takes them in their order.
        size: of the images, in pixels; training starts with small ones.
    """

    captions: Captions
    steps: int = 20
    guidance_scale: float = 3.0
    batch: int = 12
    solver: FlowSolver = "euler"
    shift: float = 2.0
    stride: int = STRIDE
    size: int = SIZE

    @torch.no_grad()
    def __call__(self, denoiser: Callable[..., Any], seed: int, batch: int | None = None) -> Tensor:
        """Images float[B, 3, size, size]; row i shows caption `rows()[i]`.

        Each step calls the denoiser once, on 2B rows: B with their caption, then the same B with the empty one.
        """
        batch = self.batch if batch is None else batch
        conditions = self.captions.conditions(self.rows(batch))

        def velocity(images: Tensor, timestep: Tensor) -> Tensor:
            predicted: Tensor = denoiser(images, timestep=timestep, return_dict=False, **conditions)[0]
            return predicted

        noise = torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))
        schedule = flow_schedule(self.solver, self.steps, self.shift)
        return sample_flow(velocity, noise, schedule, self.guidance_scale)

    def rows(self, batch: int | None = None) -> Tensor:
        """The caption of each row of a sample, spread over the sorted list: int64[B]."""
        row = torch.arange(self.batch if batch is None else batch)
        return row * self.stride % (len(self.captions.texts) - 1)


def example_inputs(captions: Captions, batch: int = 2) -> dict[str, Any]:
    """Arguments of one call on ``2 * batch`` rows: as many with captions as with the empty one."""
    return {
        "hidden_states": torch.zeros(2 * batch, 3, SIZE, SIZE),
        "timestep": torch.full((2 * batch,), 500.0),
        "return_dict": False,
        **captions.conditions(EmojiSampler(captions).rows(batch)),
    }
