"""The experiment of LazyDiT on DiT-XL/2: calibrated gates, samples, FID and IS, and the paper's table beside ours.

python examples/dit_xl2_imagenet/run.py DiT-XL-2-256 --reference imagenet/val --device cuda --output build/dit_xl2
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

import lazy_compile
from lazy_compile import AlwaysCompute
from lazy_compile.calibration.calibrator import CalibrationConfig, calibrate
from lazy_compile.errors import ArtifactError, ConfigError, LazyCompileError
from lazy_compile.progress import progress_bars
from lazy_compile.storage import save_json

# LazyDiT (arXiv 2412.12444), table 5: 256x256, guidance 1.5, 50000 samples; (DDIM steps, reused %): (FID, IS)
PAPER = {
    (50, 0): (2.34, 241.0), (40, 0): (2.39, 236.3), (25, 0): (2.95, 231.0), (20, 0): (3.53, 222.9),
    (16, 0): (4.61, 211.3), (14, 0): (5.74, 200.4), (10, 0): (12.05, 160.7), (7, 0): (34.14, 91.7),
    (50, 20): (2.37, 240.0), (50, 50): (2.70, 237.0), (40, 50): (2.95, 234.1), (20, 20): (3.45, 227.6),
    (20, 30): (4.44, 212.1), (20, 50): (6.75, 192.4), (10, 30): (17.05, 136.8),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: what was spent, what came out, and the paper's figures where it has them."""

    steps: int
    lazy_ratio: float
    compute_ratio: float
    fid: float
    inception_score: float
    paper_fid: float | None
    paper_inception_score: float | None


@dataclass(frozen=True)
class LatentSampler:
    """DDIM with classifier-free guidance, as DiTPipeline runs it; a seed fixes noise and classes."""

    scheduler: Any
    shape: tuple[int, ...]
    classes: int
    guidance: float
    steps: int
    device: str
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(self, denoiser: Callable[..., Any], seed: int) -> Tensor:
        """Latents ``float[B, C, H, W]``."""
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(self.shape, generator=generator).to(self.device, self.dtype)
        labels = torch.randint(self.classes, (len(latents),), generator=generator)
        labels = torch.cat([labels, torch.full_like(labels, self.classes)]).to(self.device)
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(self.steps)
        channels = latents.shape[1]
        for t in scheduler.timesteps:
            both = torch.cat([latents, latents])
            time = t.repeat(len(both)).to(self.device)
            noise = denoiser(both, timestep=time, class_labels=labels, return_dict=False)[0][:, :channels]
            guided, unguided = noise.chunk(2)
            noise = unguided + self.guidance * (guided - unguided)
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


def load(folder: Path, device: str, dtype: torch.dtype) -> DiTPipeline:
    if not (folder / "model_index.json").is_file():
        raise ArtifactError(
            f"{folder} holds no pipeline (no model_index.json); get the public one with: "
            f"hf download facebook/DiT-XL-2-256 --local-dir {folder}"
        )
    try:
        pipe = DiTPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot load the pipeline in {folder}: {str(error).splitlines()[0]}") from error
    return pipe.to(device)


def decode(pipe: DiTPipeline, latents: Tensor) -> Tensor:
    """``uint8[B, 3, H, W]``."""
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def reference_images(folder: Path, size: int) -> Iterator[Tensor]:
    """Every image below a folder, its middle cut out and scaled: ``uint8[1, 3, size, size]``."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(files) < 2:
        raise ConfigError(f"--reference {folder} holds {len(files)} images; give the folder of the ImageNet images")
    for file in files:
        image = Image.open(file).convert("RGB")
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.BICUBIC)
        yield torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


class Judge:
    """FID against the reference images, and the Inception score, of one set of samples after the other."""

    def __init__(self, extractors: str | None, reference: Iterator[Tensor], device: str) -> None:
        features, logits = _extractors(extractors)
        self.fid = FrechetInceptionDistance(features, reset_real_features=False).to(device)
        self.score = InceptionScore(logits, splits=10).to(device)
        self.device = device
        for image in reference:
            self.fid.update(image.to(device), real=True)

    def __call__(self, batches: Iterator[Tensor]) -> tuple[float, float]:
        self.fid.reset()
        self.score.reset()
        for images in batches:
            self.fid.update(images.to(self.device), real=False)
            self.score.update(images.to(self.device))
        return float(self.fid.compute()), float(self.score.compute()[0])


def _extractors(spec: str | None) -> tuple[Any, Any]:
    """torchmetrics' own Inception (it needs torch-fidelity and its weights), or ``module:function`` -> two modules."""
    if spec is None:
        try:
            importlib.import_module("torch_fidelity")
        except ImportError as error:
            raise ConfigError(
                "FID and IS need the Inception of torch-fidelity: pip install torch-fidelity, or give "
                "--extractors module:function that returns (features, logits)"
            ) from error
        return 2048, "logits_unbiased"
    module, _, function = spec.partition(":")
    found: tuple[nn.Module, nn.Module] = getattr(importlib.import_module(module), function)()
    return found


def run(options: argparse.Namespace) -> list[Row]:
    """Measure every pair of steps and ratio; gates, samples and the table are written as they are made."""
    dtype = getattr(torch, options.dtype)
    pipe = load(options.pipeline, options.device, dtype)
    config = pipe.transformer.config
    shape = (options.batch, config.in_channels, config.sample_size, config.sample_size)
    size = config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    judge = Judge(options.extractors, reference_images(options.reference, size), options.device)
    lazy_compile.transform(pipe)
    lazy, rows = pipe.transformer, []
    for steps in options.steps:
        sampler = LatentSampler(
            pipe.scheduler, shape, config.num_embeds_ada_norm, options.guidance, steps, options.device, dtype
        )
        for ratio in options.ratios:
            folder = options.output / f"steps{steps}_lazy{round(100 * ratio)}"
            lazy.policy = AlwaysCompute()
            if ratio:
                settings = CalibrationConfig(target_lazy_ratio=ratio, iterations=options.iterations)
                with progress_bars() as on_progress:
                    calibrate(lazy, settings, sample=sampler, on_progress=on_progress)
                lazy.save(folder / "gates")
            lazy.reset_stats()
            fid, score = judge(_samples(pipe, sampler, options.samples, folder))
            paper = PAPER.get((steps, round(100 * ratio)), (None, None))
            rows.append(Row(steps, lazy.stats.lazy_ratio, lazy.stats.compute_ratio, fid, score, *paper))
            save_json(options.output / "table.json", [asdict(row) for row in rows])
            (options.output / "table.md").write_text(table(rows, options))
    return rows


def _samples(pipe: DiTPipeline, sampler: LatentSampler, count: int, folder: Path) -> Iterator[Tensor]:
    """Batches of images, never from a seed that gates were made with; the first batch is kept as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for position, start in enumerate(range(0, count, sampler.shape[0])):
        images = decode(pipe, sampler(pipe.transformer, 1_000_000 + position))[: count - start].cpu()
        if position == 0:
            for number, image in enumerate(images):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        yield images


def table(rows: list[Row], options: argparse.Namespace) -> str:
    lines = [
        f"{options.samples} samples, guidance {options.guidance}; the paper's are 50000, with its own gates.\n",
        "| steps | reused | MACs | FID | IS | paper's FID | paper's IS |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = [value if value is not None else "" for value in (row.paper_fid, row.paper_inception_score)]
        lines.append(
            f"| {row.steps} | {row.lazy_ratio:.0%} | {row.compute_ratio:.0%} | {row.fid:.2f} | "
            f"{row.inception_score:.1f} | {paper[0]} | {paper[1]} |"
        )
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("pipeline", type=Path, help="folder with a local copy of the DiT-XL/2-256 pipeline")
    result.add_argument("--reference", type=Path, required=True, help="folder of the real images, at any depth")
    result.add_argument("--output", type=Path, default=Path("build/dit_xl2"))
    result.add_argument("--steps", type=int, nargs="+", default=[50, 20, 10])
    result.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.2, 0.3, 0.5], help="lazy ratios; 0 is dense")
    result.add_argument("--samples", type=int, default=50000)
    result.add_argument("--batch", type=int, default=32)
    result.add_argument("--guidance", type=float, default=1.5)
    result.add_argument("--iterations", type=int, default=12, help="of calibration; 0 keeps the plan")
    result.add_argument("--device", default="cuda")
    result.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    result.add_argument("--extractors", help="module:function -> (features, logits), instead of Inception")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        rows = run(options)
    except LazyCompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(rows, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
