"""A captioner from a real language model, SmolLM2-135M-Instruct: text, images, captions, and a fresh process."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import SEE_PROMPT, SOUND_PROMPT, LlavaAudioProcessor


pytestmark = pytest.mark.slow

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def captioner(smollm2_dir) -> LlavaAudioForConditionalGeneration:
    return LlavaAudioForConditionalGeneration.from_pretrained(smollm2_dir).eval()


@pytest.fixture(scope="module")
def processor(smollm2_dir) -> LlavaAudioProcessor:
    return LlavaAudioProcessor.from_pretrained(smollm2_dir)


def test_text_is_generated_token_for_token_as_by_the_language_model(captioner, processor, smollm2_file):
    folder, gguf_file = smollm2_file.parent, smollm2_file.name
    plain = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32).eval()
    for question in ("What does a dog sound like?", "Name three things that ring."):
        inputs = processor(text=processor.format_prompt(question))
        options = {"max_new_tokens": 20, "do_sample": False}
        tokens = captioner.generate(**inputs, **options)
        assert torch.equal(tokens, plain.generate(**inputs, **options))
        answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert len(answer.split()) > 5
    text = plain.config
    assert text.num_key_value_heads == 3 and text.num_attention_heads == 9 and text.tie_word_embeddings


def test_embeddings_are_tied_and_placeholders_follow_the_vocabulary(captioner, processor):
    assert [processor.image_token_id, processor.audio_token_id, processor.prefix_token_id] == [49152, 49153, 49154]
    assert captioner.lm_head.weight is captioner.get_input_embeddings().weight
    assert captioner.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert not hasattr(captioner.config.text_config, "quantization_config")


def test_chat_template_and_captions_of_the_language_model(processor):
    prompt = processor.format_prompt(SOUND_PROMPT, image=True, audio=True, prefix=True)
    user = f"<|im_start|>user\n<image><audio><prefix>\n{SOUND_PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == SYSTEM + user
    for caption in ("A dog barks twice.", "Regen fällt; 鐘の音 🔔", "two  blanks, and\na line"):
        assert (
            processor.format_prompt(SOUND_PROMPT, True, True, True, answer=caption) == f"{prompt}{caption}<|im_end|>"
        )
        ids = processor.tokenizer(caption)["input_ids"]
        assert processor.decode(ids) == caption


def test_image_logits_equal_those_of_native_llava(captioner, processor):
    config = captioner.config.to_dict()
    fields = {name: config[name] for name in ("vision_config", "text_config", "image_token_index")}
    with torch.device("meta"):
        native = LlavaForConditionalGeneration(LlavaConfig(**fields, tie_word_embeddings=True)).eval()
    weights = captioner.state_dict()
    native.load_state_dict({name: weights[name] for name in native.state_dict()}, assign=True)
    native.tie_weights()
    native.model.language_model.rotary_emb = captioner.model.language_model.rotary_emb  # not in a state dict
    positions = captioner.model.vision_tower.embeddings.position_ids
    native.model.vision_tower.embeddings.position_ids = positions
    inputs = processor(
        text=[processor.format_prompt(SEE_PROMPT, image=True)] * 2,
        images=list(torch.randint(0, 256, (2, 3, 48, 48), generator=torch.Generator().manual_seed(0))),
    )
    with torch.no_grad():
        logits = captioner(**inputs).logits
        assert torch.equal(logits, native(**inputs).logits)
    assert not torch.equal(logits[0], logits[1])


STRANGER = """
source, target = sys.argv[1:]

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(source, trust_remote_code=True).eval()
text = processor.format_prompt("What sound can be heard in this scene ?", audio=True, prefix=True)
inputs = processor(text=text, audio=torch.sin(torch.arange(16_000) / 7).numpy())
with torch.no_grad():
    torch.save(model(**inputs).logits, target)
print(json.dumps({"model": type(model).__name__, "imported": "dali_llava" in sys.modules}))
"""


def test_saved_copy_has_the_same_logits_where_the_package_is_absent(
    captioner, processor, run_without_package, tmp_path
):
    captioner.save_pretrained(tmp_path / "copy")
    processor.save_pretrained(tmp_path / "copy")
    report = run_without_package(STRANGER, tmp_path, tmp_path / "copy", tmp_path / "logits.pt")
    assert report == {"model": "LlavaAudioForConditionalGeneration", "imported": False}
    text = processor.format_prompt(SOUND_PROMPT, audio=True, prefix=True)
    inputs = processor(text=text, audio=torch.sin(torch.arange(16_000) / 7).numpy())
    with torch.no_grad():
        assert torch.equal(captioner(**inputs).logits, torch.load(tmp_path / "logits.pt"))
