"""Train the digits model and its judge, and write their checkpoints.

digits_dit.safetensors         a class-conditional DiT over 8x8 scans, 6.6 MB, about five minutes on two cores
digits_classifier.safetensors  a small classifier; its features serve for Frechet distances, seconds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lazy_compile.demo import digits
from lazy_compile.progress import progress_bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, batches and noise (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=digits.DIT_TRAINING_STEPS, help="optimizer steps of the DiT (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        metavar="FOLDER",
        help="where the two checkpoints go, over those that lie there (default: the folder of this script)",
    )
    options = parser.parse_args()

    torch.set_num_threads(2)  # sums depend on the number of threads, and so do the weights
    classifier = digits.train_digits_classifier(options.seed)
    digits.save_checkpoint(
        classifier,
        options.output / "digits_classifier.safetensors",
        seed=options.seed,
        steps=digits.CLASSIFIER_TRAINING_STEPS,
    )
    images, labels = digits.load_digits_tensor()
    held_out = classifier.accuracy(images[digits.HELD_OUT], labels[digits.HELD_OUT])
    print(f"classifier: {held_out:.1%} of the held-out scans are read correctly")

    model = digits.build_digits_dit(options.seed)
    with progress_bars() as on_progress:
        digits.train_digits_dit(model, seed=options.seed, steps=options.steps, on_progress=on_progress)
    digits.save_checkpoint(model, options.output / "digits_dit.safetensors", seed=options.seed, steps=options.steps)
    sampler = digits.DigitsSampler(batch=200)
    samples = classifier.accuracy(sampler(model, seed=options.seed), sampler.labels())
    print(f"DiT: {samples:.1%} of {sampler.batch} samples in {sampler.steps} steps are read as the digit asked for")


if __name__ == "__main__":
    main()
