"""The parts of ComfyUI that ``lazy_compile.integrations.comfyui`` meets, as its public source has them.

ComfyUI is no package that pip could install, so the tests run on this stand-in: the interfaces of ``ModelPatcher``,
``BaseModel`` and the sampler, with the same names and order of calls, and a small diffusion model made of its kind of
layers.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from support.layers import WIDTH, TimeEmbedding, merge_heads, norm, split_heads

CHANNELS, WORDS = 4, 5


class WrapperExecutor:
    """Calls wrappers around a function, the first one outermost."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: Sequence[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return WrapperExecutor(self.original, self.class_obj, self.wrappers[1:]).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrappers[0](self, *args, **kwargs) if self.wrappers else self.original(*args, **kwargs)


def all_wrappers(kind: str, options: dict[str, Any]) -> list[Callable[..., Any]]:
    return [each for found in options.get("wrappers", {}).get(kind, {}).values() for each in found]


class ModelPatcher:
    """A BaseModel with patches that clones share or have of their own."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}
        self.attachments: dict[str, Any] = {}
        self.patches: dict[str, Tensor] = {}
        self.patches_uuid = uuid.uuid4()

    def clone(self) -> ModelPatcher:
        result = ModelPatcher(self.model)
        options = self.model_options["transformer_options"]
        result.model_options = {"transformer_options": {key: dict(value) for key, value in options.items()}}
        result.wrappers = {kind: {key: [*each] for key, each in by.items()} for kind, by in self.wrappers.items()}
        result.attachments, result.patches = dict(self.attachments), dict(self.patches)
        result.patches_uuid = self.patches_uuid
        return result

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def remove_attachments(self, key: str) -> None:
        self.attachments.pop(key, None)

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def set_model_patch_replace(self, patch: Callable[..., Any], name: str, block: str, number: int) -> None:
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replaced.setdefault(name, {})[block, number] = patch

    def add_patches(self, patches: dict[str, Tensor]) -> None:
        """A LoRA: what is added to a weight, by its name."""
        self.patches.update(patches)
        self.patches_uuid = uuid.uuid4()

    def load(self, low_vram: bool) -> Callable[[], None]:
        """Put the weights in place; returns what takes them away again."""
        backup = {}
        for name, module in self.model.named_modules():
            if not isinstance(module, CastLinear):
                continue
            key = f"{name}.weight"
            if low_vram:
                module.comfy_cast_weights = True
                module.weight_function = [AddsTo(self.patches[key])] if key in self.patches else []
            elif key in self.patches:
                backup[module] = module.weight
                module.weight = nn.Parameter(module.weight + self.patches[key], requires_grad=False)
        self.model.model_lowvram, self.model.current_weight_patches_uuid = low_vram, self.patches_uuid

        def unload() -> None:
            for module in self.model.modules():
                if isinstance(module, CastLinear):
                    module.comfy_cast_weights, module.weight_function = False, []
            for module, weight in backup.items():
                module.weight = weight
            self.model.model_lowvram, self.model.current_weight_patches_uuid = False, None

        return unload


class AddsTo:
    """What low-VRAM mode applies to a weight at every use."""

    def __init__(self, change: Tensor) -> None:
        self.change = change

    def __call__(self, weight: Tensor) -> Tensor:
        return weight + self.change


class CastLinear(nn.Linear):
    """A layer of ``comfy.ops``: in low-VRAM mode its weights are cast, moved and patched when they are used."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.comfy_cast_weights = False
        self.weight_function: list[Callable[[Tensor], Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.comfy_cast_weights:
            return super().forward(x)
        weight, bias = (value.to(device=x.device, dtype=x.dtype) for value in (self.weight, self.bias))
        for function in self.weight_function:
            weight = function(weight)
        return nn.functional.linear(x, weight, bias)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (CastLinear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = CastLinear(WIDTH, 2 * WIDTH), CastLinear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        x = norm(h)
        q, k, v = (
            split_heads(self.q(x)),
            *(split_heads(layer(torch.cat([x, context], 1))) for layer in (self.k, self.v)),
        )
        h = h + self.out(merge_heads(nn.functional.scaled_dot_product_attention(q, k, v)))
        return h + self.down(nn.functional.gelu(self.up(norm(h))))


class DiffusionModel(nn.Module):
    """Frames of four channels; reads ``transformer_options`` as the models of ``comfy.ldm`` do."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.enter, self.leave, self.time = CastLinear(CHANNELS, WIDTH), CastLinear(WIDTH, CHANNELS), TimeEmbedding()
        self.blocks = nn.ModuleList(Block() for _ in range(1))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: Any = None,
        **_: Any,
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        wrappers = all_wrappers("diffusion_model", options)
        return WrapperExecutor(self._forward, self, wrappers).execute(x, timestep, context, control, options)

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Any) -> Tensor:
        h = self.enter(x.flatten(2).transpose(1, 2)) + self.time(timestep)[:, None]
        replace = options.get("patches_replace", {}).get("dit", {})
        for index, block in enumerate(self.blocks):
            options["block_index"] = index
            if ("block", index) in replace:
                h = replace["block", index](h, block)
            else:
                h = block(h, context)
            if control is not None:
                h = h + control["output"][index]
        return self.leave(h).transpose(1, 2).unflatten(2, x.shape[2:])


class ReadsSigmas(DiffusionModel):
    """Does something else late in the sampling, by what ``transformer_options`` says."""

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Any) -> Tensor:
        if options["sigmas"][0] < 0.5:
            x = 2 * x
        return super()._forward(x, timestep, context, control, options)


class BaseModel(nn.Module):
    """Holds the diffusion model, and calls it as every sampler does."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.model_lowvram, self.current_weight_patches_uuid = False, None

    def apply_model(self, x: Tensor, t: Tensor, **conds: Any) -> Tensor:
        wrappers = all_wrappers("apply_model", conds["transformer_options"])
        return WrapperExecutor(self._apply_model, self, wrappers).execute(x, t, **conds)

    def _apply_model(
        self, x: Tensor, t: Tensor, c_crossattn: Tensor, control: Any = None, transformer_options: Any = None
    ) -> Tensor:
        time = (t * 1000).to(self.diffusion_model.dtype)
        options = dict(transformer_options)
        predicted = self.diffusion_model(x, time, context=c_crossattn, control=control, transformer_options=options)
        return x - t.reshape(-1, *[1] * (x.dim() - 1)) * predicted


def diffusion_model(kind: type[DiffusionModel] = DiffusionModel) -> DiffusionModel:
    torch.manual_seed(0)
    return kind().requires_grad_(False).eval()


@dataclass
class Cond:
    context: Tensor
    control: Any = None
    uuid: Any = field(default_factory=uuid.uuid4)


@dataclass
class Window:
    """Frames of one context window."""

    index_list: list[int]


@dataclass
class Sampler:
    """KSampler: Euler steps on a grid of sigmas.

    Attributes:
        cfg: 1 calls the model with the positive conditioning alone.
        batched: cond and uncond in one batch, as memory allows it; else one after the other.
        windows: context windows over the frames of the latents.
        low_vram: weights are cast, moved and patched when they are used.
    """

    steps: int = 7
    cfg: float = 3.0
    batched: bool = True
    windows: Sequence[Sequence[int]] = ()
    low_vram: bool = False
    control: Any = None
    batch: int = 1

    def sample(self, model: ModelPatcher, seed: int) -> Tensor:
        unload = model.load(self.low_vram)
        try:
            with torch.inference_mode():
                run = WrapperExecutor(self._steps, self, [each for by in self._outer(model) for each in by])
                return run.execute(model, seed)
        finally:
            unload()

    @staticmethod
    def _outer(model: ModelPatcher) -> Any:
        return model.wrappers.get("outer_sample", {}).values()

    def conds(self, seed: int) -> list[Cond]:
        generator = torch.Generator().manual_seed(seed + 1000)
        positive, negative = (torch.randn(1, WORDS, WIDTH, generator=generator) for _ in range(2))
        return [Cond(positive, self.control), Cond(negative, self.control)][: 1 if self.cfg == 1 else 2]

    def latents(self, seed: int) -> Tensor:
        return torch.randn(self.batch, CHANNELS, 6, 4, generator=torch.Generator().manual_seed(seed))

    def sigmas(self) -> Tensor:
        return torch.linspace(1, 0, self.steps + 1)

    def _steps(self, model: ModelPatcher, seed: int) -> Tensor:
        return list(self.steps_of(model, seed))[-1]

    def steps_of(self, model: ModelPatcher, seed: int) -> Any:
        """Yields the latents after each step, so that a test can interleave two runs."""
        x, conds, sigmas = self.latents(seed), self.conds(seed), self.sigmas()
        options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, "sample_sigmas": sigmas}
        for now, after in pairwise(sigmas):
            denoised = self._denoised(model.model, x, now, conds, options)
            x = x + (x - denoised) / now * (after - now)
            yield x

    def _denoised(
        self, base: BaseModel, x: Tensor, sigma: Tensor, conds: list[Cond], options: dict[str, Any]
    ) -> Tensor:
        results = [torch.zeros_like(x) for _ in conds]
        counts = torch.zeros(x.shape[2])
        for frames in self.windows or [range(x.shape[2])]:
            window = {"context_window": Window([*frames])} if self.windows else {}
            parts = self._calls(base, x[:, :, [*frames]], sigma, conds, {**options, **window})
            for result, part in zip(results, parts, strict=True):
                result[:, :, [*frames]] += part
            counts[[*frames]] += 1
        results = [result / counts[:, None] for result in results]
        return results[0] if len(results) == 1 else results[1] + self.cfg * (results[0] - results[1])

    def _calls(
        self, base: BaseModel, x: Tensor, sigma: Tensor, conds: list[Cond], options: dict[str, Any]
    ) -> list[Tensor]:
        answers = []
        for group in [conds] if self.batched else [[cond] for cond in conds]:
            rows = len(x) * len(group)
            own = {
                "uuids": [cond.uuid for cond in group],
                "cond_or_uncond": [next(i for i, each in enumerate(conds) if each is cond) for cond in group],
                "sigmas": sigma.expand(len(x)),
            }
            context = torch.cat([cond.context.expand(len(x), -1, -1) for cond in group])
            answer = base.apply_model(
                torch.cat([x] * len(group)), sigma.expand(rows), c_crossattn=context, control=group[0].control,
                transformer_options={**options, **own},
            )  # fmt: skip
            answers += answer.chunk(len(group))
        return answers
