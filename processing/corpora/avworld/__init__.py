"""AVWorld: a procedural audiovisual world, small enough to train on in minutes, with ground truth."""

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
