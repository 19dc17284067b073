"""Configurations to plan for: a language model of the size of SmolLM2-135M with small towers."""

import pytest

from dali_llava.modeling import LlavaAudioConfig


@pytest.fixture(scope="session")
def smol_config() -> LlavaAudioConfig:
    """A captioner with a language model of the shapes of SmolLM2-135M, and towers of the width 384."""
    tower = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    return LlavaAudioConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 224, "patch_size": 16, **tower},
        text_config={
            "model_type": "llama",
            "vocab_size": 49155,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        audio_config={"output_size": 384, **tower},
        image_token_index=49152,
        audio_token_index=49153,
        prefix_token_index=49154,
        tie_word_embeddings=True,
    )
