"""Frozen parts of a stage: only trained parts have a gradient, and frozen towers build no graph."""

import pytest

from dali_llava.train.base_model import train_only
from dali_llava.train.data.augmentation import UNCHANGED
from dali_llava.train.data.collators import AlignmentCollator, CaptionCollator
from dali_llava.train.losses import MMDLoss
from dali_llava.train.trainers import AlignmentModel


def with_gradient(model) -> set[str]:
    """Returns the names of the backbone's children, and of the head, that have a gradient."""
    return {
        name.removeprefix("model.").partition(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


@pytest.fixture
def graphs(captioner):
    """Whether the output of each tower and projector requires a gradient; set by a forward pass."""
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            seen[name] = getattr(output, "last_hidden_state", output).requires_grad

        return hook

    for name in ("vision_tower", "multi_modal_projector", "audio_tower", "audio_projector"):
        getattr(captioner.model, name).register_forward_hook(note(name))
    return seen


def test_train_only_frees_the_parts_alone(captioner):
    train_only(captioner, captioner.model.prefix, captioner.lm_head)
    trained = [name for name, parameter in captioner.named_parameters() if parameter.requires_grad]
    assert trained == ["model.prefix.weight", "lm_head.weight"]
    train_only(captioner, captioner.model.audio_projector)
    trained = [name for name, parameter in captioner.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all(name.startswith("model.audio_projector.") for name in trained)


def test_prefix_tuning_gives_the_prefix_a_gradient_alone(captioner, avworld_processor, rows, graphs):
    train_only(captioner, captioner.model.prefix)
    captioner.train()
    captioner(**CaptionCollator(avworld_processor, image=True, prefix=True)(rows)).loss.backward()
    assert with_gradient(captioner) == {"prefix"}
    assert captioner.model.prefix.weight.grad.any(-1).all()  # all 16 vectors
    assert graphs == {"vision_tower": False, "multi_modal_projector": False}


def test_distillation_gives_the_audio_projector_a_gradient_alone(captioner, avworld_processor, rows, graphs):
    train_only(captioner, captioner.model.audio_projector)
    captioner.train()
    captioner(**CaptionCollator(avworld_processor, audio=True)(rows)).loss.backward()
    assert with_gradient(captioner) == {"audio_projector"}
    assert graphs == {"audio_tower": False, "audio_projector": True}


def test_alignment_gives_the_audio_tower_a_gradient_alone(captioner, avworld_processor, rows, graphs):
    model = AlignmentModel(captioner.model, MMDLoss()).train()
    batch = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)(rows)
    model(batch["pixel_values"], batch["input_features"]).loss.backward()
    assert with_gradient(captioner) == {"audio_tower"}
    without = {name for name, parameter in captioner.model.audio_tower.named_parameters() if parameter.grad is None}
    assert not without
    assert graphs == {"vision_tower": False, "audio_tower": True}
