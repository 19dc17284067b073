"""Captions of a mixed batch equal those of its samples, for all kinds of padding, beam search and caching."""

import copy

import pytest
import torch

from dali_llava.processing import SOUND_PROMPT


GREEDY = {"do_sample": False, "num_beams": 1}
BEAMS = {"do_sample": False, "num_beams": 3}


def captions(model, processor, inputs, **options) -> list[list[int]]:
    """The new tokens of each sample, up to the end token. Placeholders are suppressed in this untrained model."""
    placeholders = [processor.image_token_id, processor.audio_token_id, processor.prefix_token_id]
    with torch.no_grad():
        sequences = model.generate(**inputs, max_new_tokens=8, suppress_tokens=placeholders, **options)
    end_token, tokens = processor.tokenizer.eos_token_id, []
    for row in sequences[:, inputs["input_ids"].shape[1] :].tolist():
        end = row.index(end_token) + 1 if end_token in row else len(row)
        # beam search pads with the end token if the id of the padding is 0
        assert set(row[end:]) <= {end_token, processor.tokenizer.pad_token_id}
        tokens.append(row[:end])
    return tokens


@pytest.mark.parametrize("audio_padding", ["max_length", "longest"])
@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_mixed_batch_equals_samples_one_by_one(model, tiny_processor, encode, mixed_samples, options, audio_padding):
    kwargs = {"audio_kwargs": {"padding": audio_padding}}
    batch = encode(mixed_samples, **kwargs)
    lengths = batch["attention_mask"].sum(-1)
    assert len(set(lengths.tolist())) == len(mixed_samples)  # each sample has different padding
    assert (batch["attention_mask"].diff() >= 0).all()  # on the left
    assert ("input_features_mask" in batch) == (audio_padding == "longest")
    together = captions(model, tiny_processor, batch, **options)
    alone = [captions(model, tiny_processor, encode([sample], **kwargs), **options)[0] for sample in mixed_samples]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) >= len(mixed_samples) - 1  # otherwise equality means little


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_cache_does_not_change_tokens(model, tiny_processor, encode, mixed_samples, options):
    batch = encode(mixed_samples)
    with_cache = captions(model, tiny_processor, batch, use_cache=True, **options)
    assert captions(model, tiny_processor, batch, use_cache=False, **options) == with_cache
    assert max(map(len, with_cache)) > 1


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_each_tower_runs_once_a_caption(model, tiny_processor, encode, mixed_samples, options):
    calls = []
    hooks = [
        tower.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, tower in (("audio", model.model.audio_tower), ("image", model.model.vision_tower))
    ]
    tokens = captions(model, tiny_processor, encode(mixed_samples), **options)
    for hook in hooks:
        hook.remove()
    assert max(map(len, tokens)) > 1
    assert sorted(calls) == ["audio", "image"]


def test_merged_embeddings_written_out(model, tiny_processor, encode, mixed_samples):
    """Each placeholder gets its own token: image and audio tokens in order, and the whole prefix for each sample."""
    batch = encode(mixed_samples, audio_kwargs={"padding": "longest"})
    with torch.no_grad():
        image = iter(torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output))
        features, mask = batch["input_features"], batch["input_features_mask"]
        audio = iter(torch.cat(model.get_audio_features(features, mask).pooler_output))
        embeddings = []
        for row in batch["input_ids"].tolist():
            prefix = iter(model.model.prefix.weight)
            sources = {
                tiny_processor.image_token_id: image,
                tiny_processor.audio_token_id: audio,
                tiny_processor.prefix_token_id: prefix,
            }
            word = model.get_input_embeddings().weight
            embeddings.append(torch.stack([next(sources[t]) if t in sources else word[t] for t in row]))
            assert len(list(prefix)) in (0, 16)  # the whole prefix or none of it
        assert next(image, None) is None and next(audio, None) is None
        expected = model(inputs_embeds=torch.stack(embeddings), attention_mask=batch["attention_mask"]).logits
        assert torch.equal(model(**batch).logits, expected)


def test_backbone_aligns_with_input_ids(model, encode, mixed_samples):
    batch = encode(mixed_samples)
    with torch.no_grad():
        outputs = model.model(**batch)
        logits = model(**batch).logits
    assert outputs.last_hidden_state.shape[:2] == batch["input_ids"].shape
    assert outputs.image_hidden_states.shape == (2 * 36, 32) and outputs.audio_hidden_states.shape == (3 * 64, 32)
    assert torch.equal(model.lm_head(outputs.last_hidden_state), logits)


def test_picture_logits_do_not_depend_on_audio_weights_or_prefix(model, encode, mixed_samples):
    batch = encode(mixed_samples[1:2])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for part in (changed.model.audio_tower, changed.model.audio_projector, changed.model.prefix):
            for parameter in part.parameters():
                parameter.add_(1.0)
        assert torch.equal(changed(**batch).logits, model(**batch).logits)
        heard = encode(mixed_samples[:1])
        assert not torch.allclose(changed(**heard).logits, model(**heard).logits)


def without_one(batch, token_id: int, word_id: int):
    """The batch with the first placeholder `token_id` replaced by a word."""
    input_ids = batch["input_ids"].clone()
    row, column = (input_ids == token_id).nonzero()[0].tolist()
    input_ids[row, column] = word_id
    return {**batch, "input_ids": input_ids}


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<image>", "contains 71 image placeholders for 72 image tokens"),
        ("<audio>", "contains 191 audio placeholders for 192 audio tokens"),
        ("<prefix>", r"samples contain \[0, 15, 16\] prefix placeholders; use multiples of prefix_length, 16"),
    ],
)
def test_wrong_number_of_placeholders_names_the_counts(model, tiny_processor, encode, mixed_samples, token, message):
    token_id, word_id = tiny_processor.tokenizer.convert_tokens_to_ids([token, "dog"])
    batch = without_one(encode(mixed_samples), token_id, word_id)
    with pytest.raises(ValueError, match=message):
        model(**batch)
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, max_new_tokens=2)


def test_media_without_placeholders_are_refused(model, tiny_processor, encode, mixed_samples):
    heard = encode(mixed_samples[:1])
    text = tiny_processor(text=tiny_processor.format_prompt(SOUND_PROMPT), return_tensors="pt")
    with pytest.raises(ValueError, match="contains 0 audio placeholders for 64 audio tokens"):
        model(**text, input_features=heard["input_features"])


def test_neither_or_both_of_ids_and_embeddings_are_refused(model, encode, mixed_samples):
    batch = encode(mixed_samples[3:4])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=batch["input_ids"], inputs_embeds=torch.zeros(1, 2, 32))


def test_loss_is_the_mean_log_likelihood_of_the_labels(model, encode, mixed_samples):
    batch = encode(mixed_samples[:2])
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    with torch.no_grad():
        outputs = model(**batch, labels=labels)
    log_probabilities = outputs.logits.double().log_softmax(-1)
    expected = [-log_probabilities[row, i - 1, labels[row, i]] for row in range(2) for i in range(-4, 0)]
    torch.testing.assert_close(outputs.loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_audio_projector_can_start_as_the_image_projector(model, encode, mixed_samples):
    changed = copy.deepcopy(model)
    changed.model.copy_image_projector()
    features = encode(mixed_samples[:1])["input_features"]
    with torch.no_grad():
        expected = changed.model.multi_modal_projector(changed.model.encode_audio(features))
        assert torch.equal(torch.stack(changed.get_audio_features(features).pooler_output), expected)
        changed.model.multi_modal_projector.linear_1.weight.zero_()  # a copy, not the same weights
        assert torch.equal(torch.stack(changed.get_audio_features(features).pooler_output), expected)
