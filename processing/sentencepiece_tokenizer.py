"""The tokenizer of Llama from a SentencePiece model, `tokenizer.model`, for folders without `tokenizer.json`."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.utils import is_protobuf_available, is_sentencepiece_available


SPACE = "▁"  # SentencePiece's character for a space
BPE_MODEL = 2  # of `TrainerSpec.ModelType`
REMEDY = "copy a tokenizer.json with the same vocabulary there, for LLaVA-1.5 that of llava-hf/llava-1.5-7b-hf"


def require_sentencepiece(path: Path) -> None:
    """
    Check that SentencePiece models can be read.

    Raises:
        ImportError: the package sentencepiece or protobuf is missing. The message contains `path`.
    """
    if not (is_sentencepiece_available() and is_protobuf_available()):
        package = 'the package sentencepiece; run pip install "dali-llava[sentencepiece]"'
        raise ImportError(f"{path}: reading it needs {package}, or {REMEDY}")


def load_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """
    Load a SentencePiece model with the settings of Llama: byte-pair encoding, unknown characters as bytes.

    Text after a special token starts with a space, as in the tokenizer.json of llava-hf/llava-1.5-7b-hf:
    `<image>\\nWhat` has the tokens `<image>`, `▁`, `<0x0A>`, `What`. The original program gives the same tokens: it
    encodes the text before and after an image separately. `LlamaTokenizer` of transformers adds this space only with
    `legacy=True`, and not before text that starts with a space.

    Args:
        path: the file `tokenizer.model`.

    Raises:
        ImportError: the package sentencepiece or protobuf is missing.
        ValueError: the file is damaged, or has other settings.
    """
    require_sentencepiece(path)
    try:
        extractor = SentencePieceExtractor(str(path))
    except Exception as error:  # of protobuf
        message = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({message}); copy it again from the model's source") from error
    trainer, normalizer = extractor.proto.trainer_spec, extractor.proto.normalizer_spec
    like_llama = trainer.byte_fallback and normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
    if trainer.model_type != BPE_MODEL or not like_llama or normalizer.precompiled_charsmap:
        raise ValueError(f"{path}: not the SentencePiece model of a Llama; {REMEDY}")

    parts = extractor.extract(BPE)
    tokenizer = Tokenizer(BPE(parts["vocab"], parts["merges"], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos, eos, unk = trainer.bos_piece, trainer.eos_piece, trainer.unk_piece
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (unk, bos, eos)])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, trainer.bos_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unk)


__all__ = ["load_sentencepiece", "require_sentencepiece"]
