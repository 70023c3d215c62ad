"""Train the digits model and its judge, and write their checkpoints.

digits_dit.safetensors         a class-conditional DiT over 8x8 scans, 6.6 MB, about five minutes on two cores
digits_classifier.safetensors  a small classifier; its features serve for Frechet distances, seconds
"""

from __future__ import annotations

from pathlib import Path

import torch

from lazy_compile.bench.tasks import digits
from lazy_compile.bench.tasks.training import save_checkpoint, training_options
from lazy_compile.progress import progress_bars


def main() -> None:
    options = training_options(__doc__, digits.DIT_TRAINING_STEPS, Path(__file__).parent)
    seed, steps = options.seed, options.steps

    torch.set_num_threads(2)  # sums depend on the number of threads, and so do the weights
    classifier = digits.build_digits_classifier(seed)
    digits.train_digits_classifier(classifier, seed=seed)
    path = options.output / "digits_classifier.safetensors"
    save_checkpoint(classifier, path, seed=seed, steps=digits.CLASSIFIER_TRAINING_STEPS)
    images, labels = digits.load_digits_tensor()
    held_out = classifier.accuracy(images[digits.HELD_OUT], labels[digits.HELD_OUT])
    print(f"classifier: {held_out:.1%} of the held-out scans are read correctly")

    model = digits.build_digits_dit(seed)
    with progress_bars() as on_progress:
        digits.train_digits_dit(model, seed=seed, steps=steps, on_progress=on_progress)
    save_checkpoint(model, options.output / "digits_dit.safetensors", seed=seed, steps=steps)
    sampler = digits.DigitsSampler(batch=200)
    samples = classifier.accuracy(sampler(model, seed=seed), sampler.labels())
    print(f"DiT: {samples:.1%} of {sampler.batch} samples in {sampler.steps} steps are read as the digit asked for")


if __name__ == "__main__":
    main()
