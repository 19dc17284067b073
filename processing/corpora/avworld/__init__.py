"""AVWorld: a procedurally generated audiovisual corpus with ground truth, small enough to train on in minutes."""

from .avworld import AVWorld, AVWorldConfig
from .captions import SEE_PROMPT, SOUND_PROMPT, SOUND_WORDS, VISUAL_PROMPTS, VISUAL_WORDS
from .classes import names
from .vocabulary import build_tokenizer


__all__ = [
    "SEE_PROMPT",
    "SOUND_PROMPT",
    "SOUND_WORDS",
    "VISUAL_PROMPTS",
    "VISUAL_WORDS",
    "AVWorld",
    "AVWorldConfig",
    "build_tokenizer",
    "names",
]
