"""Train the emoji model; stopped at any moment and started again, it goes on from where it was.

emoji_captions.safetensors  the captions and their encodings; written if it is not there
emoji_pixart.safetensors    the moving average of the weights, in half precision; written by --export
emoji_judge.safetensors     which caption a picture belongs to, half precision; trained and written by --judge

Needs the extra "emoji" and Debian's fonts-noto-color-emoji. OMP_WAIT_POLICY=PASSIVE keeps threads from spinning where
other processes want the cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lazy_compile.bench.tasks import emoji, emoji_data, emoji_judge
from lazy_compile.bench.tasks.emoji_training import STAGES, EmojiTrainer, Pace, Pictures, Stage
from lazy_compile.bench.tasks.training import save_checkpoint
from lazy_compile.progress import progress_bars

HERE = Path(__file__).parent
MODEL, JUDGE, CAPTIONS = (HERE / f"emoji_{name}.safetensors" for name in ("pixart", "judge", "captions"))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, batches and noise (default: %(default)s)")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path.home() / ".cache" / "lazy_compile" / "emoji" / "state.pt",
        help="what a stopped run goes on from, with its optimizers; saved every 3 minutes (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", type=Path, metavar="CHECKPOINT", help="where there is no state, go on from exported weights"
    )
    parser.add_argument("--size", type=int, choices=(16, 32, 64), help="pixels, whatever the epoch")
    parser.add_argument("--export", action="store_true", help=f"write {MODEL.name} from the state, and end")
    parser.add_argument("--judge", action="store_true", help=f"train and write {JUDGE.name} (minutes), and end")
    return parser.parse_args()


def load_pictures() -> Pictures:
    texts, images = emoji_data.draw()
    if not CAPTIONS.exists():
        emoji_data.encode(texts).save(CAPTIONS)
    return Pictures.of(texts, images, emoji.Captions.load(CAPTIONS))


def train_judge(pictures: Pictures, seed: int) -> None:
    judge = emoji_judge.build_emoji_judge(seed)
    images = pictures.at(emoji.SIZE)
    embeddings = emoji_judge.sentence_embeddings(pictures.states, pictures.mask)
    with progress_bars() as on_progress:
        emoji_judge.train_emoji_judge(judge, images, embeddings, seed=seed, on_progress=on_progress)
    share = judge.found(images, embeddings, torch.arange(len(images)))
    save_checkpoint(judge.half(), JUDGE, seed=seed, steps=emoji_judge.JUDGE_TRAINING_STEPS)
    print(f"judge: {share:.1%} of {len(images)} drawn pictures are given their own caption")


def main() -> None:
    chosen = options()
    pictures = load_pictures()
    if chosen.judge:
        train_judge(pictures, chosen.seed)
        return
    stages = [Stage(stage.size, stage.batch, float("inf")) for stage in STAGES if stage.size == chosen.size] or STAGES
    trainer = EmojiTrainer(emoji.build_emoji_pixart(chosen.seed), pictures, seed=chosen.seed, stages=stages)
    if chosen.state.exists():
        trainer.load(chosen.state)
    elif chosen.resume is not None:
        trainer.resume(chosen.resume)
    print(f"{len(pictures.images)} pictures, step {trainer.step}, {trainer.epochs:.1f} epochs")
    if chosen.export:
        trainer.export(MODEL)
        return
    chosen.state.parent.mkdir(parents=True, exist_ok=True)
    trainer.run(Pace(trainer, chosen.state))
    trainer.save(chosen.state)


if __name__ == "__main__":
    main()
