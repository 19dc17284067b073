"""Convert released weights to a captioner of this package.

The arguments are one or more sources, each a KIND and its file, folder or ORG/NAME on the Hub, and the folder to
write. The first source starts the captioner, the others replace parts of it:

  {kinds}

Sources can also be added step by step: --base is a captioner that this command wrote, or a LLaVA. Parts without a
source start as in the papers: the audio tower with random weights, the audio projector as a copy of the image
projector, the prefix with random vectors. The command reports which tensors of each source it used and dropped.

Weights are converted one tensor at a time and keep their dtype. Pickled files (.pth, .bin) are read without running
code. OUT is written completely or not at all.

examples:
  dali-llava convert llava llava-hf/llava-1.5-7b-hf captioner
  dali-llava convert llava liuhaotian/llava-v1.5-7b captioner --vision openai/clip-vit-large-patch14-336
  dali-llava convert llava llava-hf/llava-1.5-7b-hf cav-mae cav-mae-scale++.pth captioner
  dali-llava convert dali weights/ captioner --base llava-hf/llava-1.5-7b-hf
  dali-llava convert language-model SmolLM2-135M-Instruct.gguf captioner --vision openai/clip-vit-base-patch32
"""

import argparse
from pathlib import Path

from dali_llava.atomic import check_new_folder, new_folder


# Kinds that start a captioner, and kinds that replace parts of one. modeling/convert/ has a module for each.
BASES = {
    "llava": "LLaVA-1.5, as saved by transformers or by the original program (with --vision)",
    "language-model": "language model like Llama, folder or .gguf file (with --vision); its projectors are random",
}
PARTS = {
    "cav-mae": "audio tower of CAV-MAE (.pth); its last linear layer starts with random weights",
    "dali": "folder of DALI's own code: audio_backbone.pth, and if present prefix.bin and prefixMLP.bin",
    "ced": "audio tower of CED (.pt, or a model on the Hub)",
}
__doc__ = __doc__.format(kinds="\n  ".join(f"{kind:<16}{line}" for kind, line in (BASES | PARTS).items()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument(
        "words", nargs="+", metavar="KIND SOURCE [KIND SOURCE ...] OUT", help="sources, and the result"
    )
    parser.add_argument("--base", metavar="MODEL", help="captioner or LLaVA whose parts the sources replace")
    parser.add_argument("--vision", metavar="CLIP", help="vision tower of a source without one: folder or ORG/NAME")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="dtype of all weights of OUT")
    parser.set_defaults(usage_error=parser.error)


def parse_sources(words: list[str], base: str | None) -> tuple[list[tuple[str, str]], Path]:
    """
    The (kind, source) pairs in order, and the folder to write.

    Raises:
        ValueError: the words are not pairs and a folder, a kind is unknown, or the first source starts no captioner.
    """
    *words, out = words
    pairs = list(zip(words[::2], words[1::2], strict=False))
    if not words or len(words) % 2:
        raise ValueError("give KIND SOURCE pairs and then OUT; see dali-llava convert --help")
    if base is not None:
        pairs.insert(0, ("llava", base))
    for number, (kind, source) in enumerate(pairs):
        if kind not in BASES | PARTS:
            raise ValueError(f"{kind}: unknown kind of source; choose one of {', '.join(BASES | PARTS)}")
        if number and kind in BASES:
            raise ValueError(f"{kind} {source}: only the first source, or --base, can be a whole captioner")
    if pairs[0][0] in PARTS:
        raise ValueError(f"{pairs[0][0]}: is only a part of a captioner; add --base MODEL, or `llava MODEL` before it")
    return pairs, Path(out)


def run(args: argparse.Namespace) -> int:
    """Convert the sources and print what became of their tensors."""
    try:
        pairs, out = parse_sources(args.words, args.base)
    except ValueError as error:
        args.usage_error(str(error))
    check_new_folder(out)

    import torch

    from dali_llava.modeling.convert import get_converter
    from dali_llava.modeling.convert.download import find_source
    from dali_llava.processing import assembly

    (kind, first), *others = [(kind, find_source(source)) for kind, source in pairs]
    vision = None if args.vision is None else find_source(args.vision)
    load_tokenizer = assembly.load_language_model_tokenizer if kind == "language-model" else assembly.load_tokenizer
    tokenizer = load_tokenizer(first)
    captioner = get_converter(kind)(first, tokenizer, vision=vision)
    for kind, source in others:
        captioner = get_converter(kind)(source, captioner)
    if args.dtype is not None:
        captioner = captioner.to(getattr(torch, args.dtype))
    feature_extractor, chat_template = assembly.load_audio_settings(first)
    processor = assembly.assemble_processor(
        tokenizer,
        assembly.load_image_processor(vision or first),
        None if others else feature_extractor,  # another audio tower has another one
        captioner.config,
        chat_template,
    )
    generation = captioner.generation_config
    generation.eos_token_id = assembly.end_token_ids(processor, generation.eos_token_id)
    with new_folder(out) as folder:
        captioner.save(folder)
        processor.save_pretrained(folder)
    for name, report in captioner.reports.items():
        print(f"{name}:")
        print("\n".join(f"  {line}" for line in report.splitlines()))
    print(f"written: {out}")
    return 0
