"""A small but real T5 tokenizer: a SentencePiece unigram model trained on made-up captions.

Saved as real checkpoints have it, ``spiece.model`` and ``tokenizer_config.json``, it is meant to be loaded
from its folder: ``T5Tokenizer(vocab_file=...)`` makes a tokenizer without a vocabulary in transformers 5.
"""

from __future__ import annotations

import io
import itertools
import json
import string
from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_tokenizer"]

_SUBJECTS = (
    "A grey rabbit",
    "A small brown squirrel",
    "A young woman in a red coat",
    "An old man",
    "A yellow bird",
    "The white sailing boat",
    "Two children",
    "A city street at night",
)
_ACTIONS = (
    "slowly turns its head toward the camera",
    "walks through tall green grass",
    "looks up and smiles",
    "stands in front of a huge tree",
    "moves from left to right",
    "jumps over a stream",
)
_PLACES = (
    "in a bright forest clearing under a pale blue sky.",
    "beside the calm blue sea with soft waves.",
    "while the camera glides downward, in a colourful 3D animated style.",
    "as the sun is setting, close-up.",
    "with mountains and pink clouds in the distance, cinematic lighting.",
)


def write_tokenizer(folder: Path, text_length: int, captions: Sequence[str] = ()) -> None:
    """Train the tokenizer and write it to ``folder``; the same bytes every time.

    Args:
        captions: What it learns from. Default: made-up ones.

    Ids are T5's: 0 is padding, 1 the end, 2 unknown. All printable ASCII characters are known.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions or _captions()),
        model_writer=model,
        model_type="unigram",
        vocab_size=384,
        hard_vocab_limit=False,  # so little text gives fewer pieces
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 100,
        "model_max_length": text_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _captions() -> list[str]:
    return [" ".join(parts) for parts in itertools.product(_SUBJECTS, _ACTIONS, _PLACES)]
