"""Train the scenes model and its judge, and write their checkpoints.

scenes_mmdit.safetensors       a two-stream MMDiT over 16x16 colour scenes, about 25 minutes on one core
scenes_classifier.safetensors  a small classifier; its features serve for Frechet distances, half a minute
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lazy_compile.demo import scenes
from lazy_compile.demo.digits import save_checkpoint
from lazy_compile.progress import OnProgress, progress_bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, scenes and noise (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=scenes.MMDIT_TRAINING_STEPS, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        metavar="FOLDER",
        help="where the two checkpoints go, over those that lie there (default: the folder of this script)",
    )
    options = parser.parse_args()

    torch.set_num_threads(1)  # sums depend on the number of threads, and so do the weights
    classifier = scenes.train_scenes_classifier(options.seed)
    path = options.output / "scenes_classifier.safetensors"
    save_checkpoint(classifier, path, seed=options.seed, steps=scenes.CLASSIFIER_TRAINING_STEPS)
    unseen = scenes.SceneSource().draw(1000, torch.Generator().manual_seed(options.seed + 2))
    print(f"classifier: {classifier.accuracy(unseen.images, unseen.words):.1%} of 1000 new scenes are read correctly")

    with progress_bars() as on_progress:
        model = train(options.seed, options.steps, on_progress)
    save_checkpoint(model, options.output / "scenes_mmdit.safetensors", seed=options.seed, steps=options.steps)
    sampler = scenes.ScenesSampler(batch=192)
    share = classifier.accuracy(sampler(model, seed=options.seed), sampler.words())
    print(f"MMDiT: {share:.1%} of {sampler.batch} samples in {sampler.steps} steps are read as what was asked for")


def train(seed: int, steps: int, on_progress: OnProgress) -> torch.nn.Module:
    model = scenes.build_scenes_mmdit(seed)
    scenes.train_scenes_mmdit(model, seed=seed, steps=steps, on_progress=on_progress)
    return model


if __name__ == "__main__":
    main()
