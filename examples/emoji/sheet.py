"""Draw examples/emoji/sheet.png: dense samples over lazy ones at falling compute, from the same noise.

The captions are every 121st of the sorted list; nothing is chosen by hand. Schedules are planned without gradient on
four images of other noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import lazy_compile
from lazy_compile.bench.quality import FIRST_SAMPLING_SEED, rmse
from lazy_compile.bench.tasks.emoji import Captions, EmojiSampler
from lazy_compile.bench.tasks.emoji_judge import load_emoji_judge, sentence_embeddings
from lazy_compile.bench.tasks.registry import Subject, emoji_subject
from lazy_compile.progress import progress_bars

HERE = Path(__file__).parent
RATIOS = (0.7, 0.5, 0.35)
LEFT, BOTTOM, GAP, SIDE = 170, 62, 8, 64


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "sheet.png", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=12, help="columns (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=160, help="of the model, for each plan (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels (default: %(default)s)")
    return parser.parse_args()


class Scores:
    """What the judge, and the dense images, say of others."""

    def __init__(self, captions: Captions, rows: Tensor, dense: Tensor) -> None:
        self.judge, self.rows, self.dense = load_emoji_judge(HERE / "emoji_judge.safetensors"), rows, dense
        self.embeddings = sentence_embeddings(captions.states, captions.mask)

    def __call__(self, images: Tensor) -> dict[str, Any]:
        found = {f"among {k}": self.judge.found(images, self.embeddings, self.rows, k) for k in (1, 5)}
        apart = {"rmse": rmse(images, self.dense), "perceptual": self.judge.perceptual_distance(images, self.dense)}
        return {name: round(value, 4) for name, value in {**apart, **found}.items()}


def lazy_rows(subject: Subject, sampler: EmojiSampler, calls: int, scores: Scores) -> list[tuple[str, Tensor]]:
    lazy = lazy_compile.transform(subject.model, subject.example, reuse="taylor")
    rows = []
    with progress_bars() as on_progress:
        for ratio in RATIOS:
            budget = lazy_compile.Budget(compute_ratio=ratio)
            few = replace(sampler, batch=4)
            lazy.policy = lazy_compile.Scheduled(
                lazy_compile.plan(lazy, few, budget, calls=calls, on_progress=on_progress)
            )
            lazy.reset_stats()
            images = sampler(lazy, FIRST_SAMPLING_SEED)
            rows.append((f"lazy, {lazy.stats.compute_ratio:.0%}", images))
            print(f"{rows[-1][0]} of the MACs: {scores(images)}")
    return rows


def sheet(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> Image.Image:
    """One line of pictures for each row, its name in front; under each column its caption."""
    page = Image.new("RGB", (LEFT + len(captions) * (SIDE + GAP), len(rows) * (SIDE + GAP) + BOTTOM), "white")
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(18), ImageFont.load_default(10)
    for place, (name, images) in enumerate(rows):
        top = place * (SIDE + GAP)
        pen.text((8, top + SIDE // 2 - 10), name, fill="black", font=font)
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for column, picture in enumerate(pixels):
            shown = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            page.paste(shown, (LEFT + column * (SIDE + GAP), top))
    for column, caption in enumerate(captions):
        lines = "\n".join(caption.split())
        pen.multiline_text((LEFT + column * (SIDE + GAP), len(rows) * (SIDE + GAP)), lines, fill="black", font=small)
    return page


def main() -> None:
    chosen, subject = options(), emoji_subject()
    captions = Captions.load(HERE / "emoji_captions.safetensors")
    sampler = EmojiSampler(captions, steps=chosen.steps, batch=chosen.images, size=chosen.size)
    dense = sampler(subject.model, FIRST_SAMPLING_SEED)
    scores = Scores(captions, sampler.rows(), dense)
    print(f"dense: {scores(dense)}")
    rows = [("dense, 100%", dense), *lazy_rows(subject, sampler, chosen.calls, scores)]
    sheet(rows, [captions.texts[row] for row in sampler.rows().tolist()]).save(chosen.output)
    print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
