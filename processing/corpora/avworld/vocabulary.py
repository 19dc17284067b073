"""The word-level tokenizer of AVWorld."""

import re

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from .captions import SOUND_WORDS, VISUAL_WORDS, grammar_texts


SPECIAL_TOKENS: tuple[str, ...] = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<audio>", "<prefix>")
PUNCTUATION = ".?,':"

# Words outside the grammar that users may type.
COMMON_WORDS: tuple[str, ...] = tuple(
    "user assistant ' : it its they this that these those who when how why which where you i we he she one two three "
    "four five some many more other with without from to at by for under over near behind beside between left right "
    "top bottom middle big small happening happens event events audio clip video photo please list name tell me "
    "about has have not only every thing things object objects animal animals".split()
)


def vocabulary() -> list[str]:
    """The special tokens, followed by the words of the grammar and the common words in alphabetical order."""
    tokens = re.findall(f"[{PUNCTUATION}]|[^\\s{PUNCTUATION}]+", " ".join(grammar_texts()).lower())
    return [*SPECIAL_TOKENS, *sorted({*tokens} | SOUND_WORDS | VISUAL_WORDS | set(COMMON_WORDS))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of lowercase words and single punctuation marks. It pads on the left and adds <s> at the start.

    Decoding with `skip_special_tokens=True` returns text as in the captions: words separated by blanks, without a
    blank before a comma, a full stop or a question mark.
    """
    tokens = vocabulary()
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex(f"[{PUNCTUATION}]"), "isolated")])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", tokens.index("<s>"))]
    )
    # Joins words with blanks, without a blank before punctuation. No word starts with its prefix of word pieces.
    tokenizer.decoder = WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
