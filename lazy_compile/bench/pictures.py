"""Pictures of captions: dense, lazy at falling compute, and as many dense steps as that pays for, from the same noise.

The captions are those that the sampler takes by itself, evenly spread over the sorted list: nothing is chosen by hand.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lazy_compile.bench.quality import FIRST_SAMPLING_SEED, scores
from lazy_compile.bench.tasks.registry import Subject, emoji_subject
from lazy_compile.bench.tasks.training import default_checkpoints
from lazy_compile.compiler import transform
from lazy_compile.errors import import_optional
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.planner import plan
from lazy_compile.policies.policy import Scheduled
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.reporting.figures import LABELS
from lazy_compile.runtime.module import LazyModule
from lazy_compile.storage import atomic_path, save_json

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = 20
WHOLE_STEPS = {0.7: 14, 0.5: 10, 0.35: 7}
"""Steps of 20 that each budget pays for: a plan may spend what as many whole steps cost."""
IMAGES = 12


@dataclass(frozen=True)
class PlanSettings:
    """How schedules are searched for, without gradient.

    Attributes:
        images: a trajectory, of noise that no picture starts from.
        calls: of the model in all, for each schedule.
        seed: of that noise.
    """

    images: int = 4
    calls: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Strip:
    """Images of one method.

    Attributes:
        method: ``"dense"``, ``"planned"`` or ``"ddim"`` (fewer dense steps), as in `LABELS`.
        steps: denoising steps.
        compute_ratio: MACs spent over those of the dense model at full steps.
        images: ``float[B, C, H, W]`` in [-1, 1].
        scores: see `lazy_compile.bench.quality.scores`; the reference is the dense strip.
    """

    method: str
    steps: int
    compute_ratio: float
    images: Tensor
    scores: Mapping[str, float]

    @property
    def label(self) -> str:
        return f"{LABELS[self.method]}, {self.steps} steps\n{self.compute_ratio:.0%} of the MACs"

    def record(self) -> dict[str, Any]:
        return {"method": self.method, "steps": self.steps, "compute_ratio": self.compute_ratio, **self.scores}


def lazy_model(subject: Subject) -> LazyModule:
    """The model that the schedules are for: reuse along a damped parabola."""
    lazy: LazyModule = transform(subject.model, subject.example, reuse="taylor")
    return lazy


def strips(
    subject: Subject,
    lazy: LazyModule,
    schedules: Mapping[float, CacheSchedule],
    images: int,
    on_progress: OnProgress = no_progress,
) -> list[Strip]:
    """Dense first, then for each schedule, dearest first, the planned images and as many dense steps as they cost."""
    made: list[Strip] = []
    total = 1 + 2 * len(schedules)

    def add(method: str, steps: int, run: Callable[[], tuple[Tensor, float]]) -> None:
        on_progress("drawing", len(made), total, f"{LABELS[method]}, {steps} steps")
        drawn, compute = run()
        dense = made[0].images if made else drawn
        made.append(Strip(method, steps, compute, drawn, scores(subject, drawn, dense, dense)))

    def original(steps: int, of: int) -> tuple[Tensor, float]:
        return subject.sampler(steps, images)(subject.model, FIRST_SAMPLING_SEED), steps / of  # type: ignore[arg-type]

    def planned(schedule: CacheSchedule) -> tuple[Tensor, float]:
        lazy.policy = Scheduled(schedule)
        lazy.reset_stats()
        drawn = subject.sampler(schedule.steps, images)(lazy, FIRST_SAMPLING_SEED)
        return drawn, lazy.stats.compute_ratio

    steps = max(schedule.steps for schedule in schedules.values())
    add("dense", steps, lambda: original(steps, steps))
    for _, schedule in sorted(schedules.items(), reverse=True):
        add("planned", steps, lambda: planned(schedule))  # noqa: B023
        fewer = math.ceil(made[-1].compute_ratio * steps - FEWER_SLACK)
        add("ddim", fewer, lambda: original(fewer, steps))  # noqa: B023
    on_progress("drawing", total, total, "")
    return made


FEWER_SLACK = 0.1
"""Of a step: what a lazy trajectory may cost beyond whole steps and is still compared with these."""


def schedules_of(
    subject: Subject, lazy: LazyModule, folder: Path, settings: PlanSettings, on_progress: OnProgress = no_progress
) -> dict[float, CacheSchedule]:
    """The schedules in a folder, by budget: read where they are there, else planned and written."""
    share = sum(branch.macs for branch in lazy.branches) / lazy.graph.total_macs
    found = {}
    for budget, whole in WHOLE_STEPS.items():
        path = folder / f"{100 * budget:.0f}.json"
        if not path.exists():
            spend = Budget(compute_ratio=1 - share * (1 - whole / STEPS) + 1e-4)
            planned = plan(
                lazy, subject.sampler(STEPS, settings.images), spend, calls=settings.calls, seed=settings.seed,
                on_progress=on_progress,
            )  # fmt: skip
            save_json(path, planned.to_json())
        found[budget] = CacheSchedule.load(path)
    return found


def measure_pictures(
    output: Path, images: int = IMAGES, settings: PlanSettings | None = None, on_progress: OnProgress = no_progress
) -> list[dict[str, Any]]:
    """Draw the emoji; write ``emoji.png``, ``emoji_50.png`` (without the other budgets), ``emoji.json`` and ``.md``.

    Schedules lie beside the weights; one that is missing is planned first, which takes minutes.

    Raises:
        ArtifactError: there are no weights.
    """
    subject = emoji_subject()
    lazy = lazy_model(subject)
    folder = default_checkpoints("emoji") / "schedules"
    made = strips(
        subject, lazy, schedules_of(subject, lazy, folder, settings or PlanSettings(), on_progress), images, on_progress
    )
    middle = 1 + 2 * list(WHOLE_STEPS).index(0.5)
    for name, shown in (("emoji", made), ("emoji_50", [made[0], *made[middle : middle + 2]])):
        save_sheet(output / f"{name}.png", shown, subject.captions(images))
    rows = [strip.record() for strip in made]
    save_json(output / "emoji.json", {"captions": list(subject.captions(images)), "rows": rows})
    with atomic_path(output / "emoji.md") as temporary:
        temporary.write_text(markdown(rows, images), encoding="utf-8")
    return rows


COLUMNS = ("method", "steps", "MACs", "RMSE to dense", "median image", "PSNR", "SSIM", "perceptual distance",
           "own caption first", "among five")  # fmt: skip

ABOUT = """# Pictures of emoji

Written by `lazy-compile bench pictures`; the rows stand in [emoji.json](emoji.json).

![Emoji sampled dense, and for each budget with a planned schedule and with fewer steps, from the same noise](emoji.png)

A PixArt over 64x64 pixels that knows 1,434 emoji by heart ([how it was
trained](https://github.com/lazy-compile/lazy_compile/blob/main/examples/emoji/README.md)), flow matching, Euler,
guidance 3. The {images} captions are evenly spread over the sorted list, and all rows start from the same noise.
Schedules were planned on other noise; what is reused is extrapolated along a damped parabola.

RMSE, PSNR and SSIM are to the dense pictures of 20 steps, in a range of 2. A small network that was trained to give
drawn emoji their caption judges: whether the own caption is the nearest of all, or among five, and the *perceptual
distance* to the dense pictures, the mean squared difference of its normalised activations. It is no LPIPS: network and
data are its own.
"""


def markdown(rows: Sequence[Mapping[str, Any]], images: int) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in rows:
        name = LABELS[row["method"]]
        lines.append(
            [
                f"**{name}**" if row["method"] == "planned" else name, str(row["steps"]), f"{row['compute_ratio']:.1%}",
                *(f"{row[score]:.4f}" for score in ("rmse_dense", "median_dense")),
                f"{row['psnr']:.1f} dB" if row["rmse_dense"] else "",
                *(f"{row[score]:.4f}" for score in ("ssim", "perceptual")),
                *(f"{row[score]:.0%}" for score in ("accuracy", "among_five")),
            ]
        )  # fmt: skip
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{ABOUT.format(images=images)}\n{table}\n"


# Drawing ----------------------------------------------------------------------------------------------------------

SIDE, GAP, LEFT, BOTTOM = 128, 14, 330, 120


def save_sheet(path: Path, shown: Sequence[Strip], captions: Sequence[str]) -> None:
    buffer = io.BytesIO()
    sheet(shown, captions).save(buffer, "png", optimize=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def sheet(shown: Sequence[Strip], captions: Sequence[str]) -> Image:
    """A line of pictures for each strip, its label in front; under each column its caption."""
    image, draw, fonts = (import_optional(f"PIL.{name}", "demo") for name in ("Image", "ImageDraw", "ImageFont"))
    page: Image = image.new("RGB", (LEFT + len(captions) * (SIDE + GAP), len(shown) * (SIDE + GAP) + BOTTOM), "white")
    pen, font, small = draw.Draw(page), fonts.load_default(25), fonts.load_default(19)
    for place, strip in enumerate(shown):
        top = place * (SIDE + GAP) + GAP // 2
        ink = OURS if strip.method == "planned" else INK
        pen.multiline_text((8, top + SIDE // 2 - 32), strip.label, fill=ink, font=font)
        for column, picture in enumerate(_pixels(strip.images)):
            shown_picture = image.fromarray(picture).resize((SIDE, SIDE), image.Resampling.BICUBIC)
            page.paste(shown_picture, (LEFT + column * (SIDE + GAP), top))
    for column, caption in enumerate(captions):
        lines = "\n".join(_wrapped(caption))
        corner = (LEFT + column * (SIDE + GAP), len(shown) * (SIDE + GAP) + GAP)
        pen.multiline_text(corner, lines, fill=INK, font=small)
    return page


INK, OURS = "#22262e", "#c2410c"


def _pixels(images: Tensor) -> Iterator[Any]:
    yield from ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def _wrapped(caption: str, width: int = 13, lines: int = 4) -> list[str]:
    """At most so many lines of words; what does not fit ends in an ellipsis."""
    return textwrap.wrap(caption, width, max_lines=lines, placeholder=" …", break_long_words=False)
