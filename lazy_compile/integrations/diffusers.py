"""diffusers: denoisers read from its folders, and trajectories sampled with its schedulers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.errors import ArtifactError, ConfigError, import_optional, one_line, shown
from lazy_compile.storage import load_json

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # clipping is for pixels, and hides errors of latents
    "flow-match": ("FlowMatchEulerDiscreteScheduler", {}),
}

_SAMPLE_NAMES = ("hidden_states", "sample", "latents", "x")
_DENOISERS = ("transformer", "unet")
_TIME_NAMES = ("timestep", "timesteps", "t", "time", "sigma")


@dataclass(frozen=True)
class SchedulerSampler:
    """Denoises seeded noise with a diffusers scheduler; every argument but sample and timestep keeps its example value.

    Attributes:
        scheduler: any diffusers scheduler with ``set_timesteps`` and ``step``.
        example_inputs: the arguments of one call, by name; they fix sizes, dtypes and devices.
        steps: how many denoising steps.
        sample_argument: the argument that carries the noisy sample. None takes the first of ``hidden_states``,
            ``sample``, ``latents``, ``x`` that there is, else the first floating tensor of rank 3 or more.
        timestep_argument: the argument that carries the time. None takes the first of ``timestep``, ``timesteps``,
            ``t``, ``time``, ``sigma``.

    >>> from diffusers import DDIMScheduler
    >>> sample = SchedulerSampler(DDIMScheduler(), {"x": torch.zeros(2, 4, 8), "t": torch.zeros(2)}, steps=4)
    >>> sample(lambda x, t: 0.1 * x, seed=0).shape
    torch.Size([2, 4, 8])
    """

    scheduler: Any
    example_inputs: Mapping[str, Any]
    steps: int = 20
    sample_argument: str | None = None
    timestep_argument: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; use 1 or more")
        tensors = {name: value for name, value in self.example_inputs.items() if isinstance(value, Tensor)}
        large = [name for name, value in tensors.items() if value.is_floating_point() and value.dim() >= 3]
        sample = self.sample_argument or _first_of(_SAMPLE_NAMES, large) or next(iter(large), None)
        timestep = self.timestep_argument or _first_of(_TIME_NAMES, list(tensors))
        for role, name in (("sample", sample), ("timestep", timestep)):
            if name not in tensors:
                raise ConfigError(
                    f"the {role} argument is {name!r}; the tensors among the example inputs are "
                    f"{', '.join(tensors) or 'none'}: name one of them with {role}_argument=..."
                )
        object.__setattr__(self, "sample_argument", sample)
        object.__setattr__(self, "timestep_argument", timestep)

    @torch.no_grad()
    def __call__(self, denoiser: Callable[..., Any], seed: int) -> Tensor:
        """Samples, shaped like the sample argument; the noise depends on the seed alone."""
        assert self.sample_argument is not None
        assert self.timestep_argument is not None
        arguments = dict(self.example_inputs)
        like, time_like = arguments[self.sample_argument], arguments[self.timestep_argument]
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(self.steps)
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
        sample = noise.to(like.device) * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            arguments[self.sample_argument] = scaled.to(like.dtype)
            arguments[self.timestep_argument] = torch.full_like(time_like, t.item())
            # A learned variance rides behind the channels of the prediction.
            predicted = _first_tensor(denoiser(**arguments))
            predicted = predicted[:, : like.shape[1]] if predicted.dim() >= 4 else predicted
            sample = scheduler.step(predicted.to(sample), t, sample, return_dict=False)[0]
        return sample


def make_scheduler(name: str, folder: Path | None = None) -> Any:
    """The scheduler of that short name, or of a pipeline's own ``scheduler`` folder."""
    diffusers = import_optional("diffusers", "diffusers")
    if folder is not None:
        class_name = _class_name(folder / "scheduler_config.json")
        kind = getattr(diffusers, class_name, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            raise ArtifactError(
                f"{folder} names the scheduler {shown(class_name, 60)}, which diffusers {diffusers.__version__} has "
                "not; install the release that wrote it"
            )
        try:
            return kind.from_pretrained(folder)  # type: ignore[attr-defined]
        except Exception as error:  # diffusers raises whatever a strange configuration leads to
            raise ArtifactError(
                f"cannot make the {class_name} in {folder}: {type(error).__name__}: {shown(error)}; expected what "
                "save_pretrained() wrote"
            ) from error
    if name not in SCHEDULERS:
        raise ConfigError(f"the scheduler is {shown(name)}; expected one of {', '.join(SCHEDULERS)}")
    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name)(**options)


def load_denoiser(folder: Path) -> nn.Module:
    """The model in a diffusers folder, of the class that its ``config.json`` names; nothing is downloaded.

    Raises:
        ArtifactError: the folder holds no model, or one that this release of diffusers does not know.
    """
    config = folder / "config.json"
    if not config.exists():
        models = sorted(file.parent.name for file in folder.glob("*/config.json"))
        hint = f"it has {', '.join(models)}: name one as {folder}#{models[0]}" if models else "name a diffusers folder"
        raise ArtifactError(f"{folder} holds no config.json; {hint}")
    diffusers = import_optional("diffusers", "diffusers")
    name = _class_name(config)
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ArtifactError(
            f"{config} names the class {shown(name)}, which diffusers {diffusers.__version__} has not as a model; "
            "install the release that wrote it"
        )
    try:
        model: nn.Module = kind.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
    except Exception as error:  # diffusers raises whatever a strange configuration leads to
        raise ArtifactError(f"cannot load {name} from {folder}: {type(error).__name__}: {shown(error)}") from error
    return model.eval()


def download_denoiser(name: str, subfolder: str = "") -> tuple[Path, str]:
    """The folder of a repository of the Hub, in the cache that diffusers uses, with one model and its scheduler.

    What is there already is not downloaded again; without a network, or with ``HF_HUB_OFFLINE=1``, it is all there is.

    Args:
        name: ``owner/name``.
        subfolder: of the model. Empty takes the ``transformer`` or ``unet`` of a pipeline, else the repository itself.

    Returns:
        The folder, and the model's subfolder in it.

    Raises:
        ArtifactError: there is no such repository, or it cannot be reached and is not in the cache.
    """
    hub = import_optional("huggingface_hub", "diffusers")
    try:
        folder = Path(hub.snapshot_download(name, allow_patterns=["*.json"]))
        if not subfolder and not (folder / "config.json").exists():
            subfolder = next((part for part in _DENOISERS if (folder / part / "config.json").exists()), "")
        where = f"{subfolder}/" if subfolder else ""
        weights = [f"{where}diffusion_pytorch_model*{ending}" for ending in (".safetensors", ".safetensors.index.json")]
        folder = Path(hub.snapshot_download(name, allow_patterns=["*.json", *weights]))
    except Exception as error:  # each release has more classes for what can go wrong on a network
        raise ArtifactError(
            f"cannot get {name} from the Hub: {type(error).__name__}: {shown(error)}; expected the owner/name of a "
            "public repository, or one in the local cache, or a folder"
        ) from error
    return folder, subfolder


def _class_name(config: Path) -> str:
    try:
        return str(load_json(config)["_class_name"])
    except (KeyError, TypeError, ArtifactError) as error:
        raise ArtifactError(
            f"{config} names no _class_name ({one_line(repr(error))}); expected a file that diffusers wrote"
        ) from error


def _first_of(wanted: Sequence[str], present: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in present), None)


def _first_tensor(result: Any) -> Tensor:
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            return leaf
    raise ConfigError(f"the denoiser returned {type(result).__name__} without a tensor; expected its prediction first")
