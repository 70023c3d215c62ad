"""Train the scenes model and its judge, and write their checkpoints.

scenes_mmdit.safetensors       a two-stream MMDiT over 16x16 colour scenes, about 25 minutes on one core
scenes_classifier.safetensors  a small classifier; its features serve for Frechet distances, half a minute
"""

from __future__ import annotations

from pathlib import Path

import torch

from lazy_compile.bench.tasks import scenes
from lazy_compile.bench.tasks.training import save_checkpoint, training_options
from lazy_compile.progress import progress_bars


def main() -> None:
    options = training_options(__doc__, scenes.MMDIT_TRAINING_STEPS, Path(__file__).parent)
    seed, steps = options.seed, options.steps

    torch.set_num_threads(1)  # sums depend on the number of threads, and so do the weights
    classifier = scenes.build_scenes_classifier(seed)
    scenes.train_scenes_classifier(classifier, seed=seed)
    path = options.output / "scenes_classifier.safetensors"
    save_checkpoint(classifier, path, seed=seed, steps=scenes.CLASSIFIER_TRAINING_STEPS)
    unseen = scenes.SceneSource().draw(1000, torch.Generator().manual_seed(seed + 2))
    share = classifier.accuracy(unseen.images, unseen.classes)
    print(f"classifier: {share:.1%} of 1000 new scenes are read correctly")

    model = scenes.build_scenes_mmdit(seed)
    with progress_bars() as on_progress:
        scenes.train_scenes_mmdit(model, seed=seed, steps=steps, on_progress=on_progress)
    save_checkpoint(model, options.output / "scenes_mmdit.safetensors", seed=seed, steps=steps)
    sampler = scenes.ScenesSampler(batch=192)
    share = classifier.accuracy(sampler(model, seed=seed), scenes.classes_of(sampler.words()))
    print(f"MMDiT: {share:.1%} of {sampler.batch} samples in {sampler.steps} steps are read as what was asked for")


if __name__ == "__main__":
    main()
