"""The alignment's model, its Adam with coupled weight decay, and the halved learning rate."""

import pytest
import torch
from transformers import Adafactor, TrainerState

from dali_llava.train import align
from dali_llava.train.arguments import AlignmentArguments
from dali_llava.train.data.augmentation import UNCHANGED
from dali_llava.train.data.collators import AlignmentCollator
from dali_llava.train.losses import LOSSES, AttentiveTransportLoss, MMDLoss
from dali_llava.train.trainers import AlignmentModel, AlignmentTrainer
from dali_llava.train.trainers.alignment import ScheduleEpochs


@pytest.fixture
def make_trainer(towers, avworld_processor, tmp_path):
    """`make_trainer(objective, rows, **arguments)`: a trainer that aligns the run's captioner on `rows` rows."""

    def make_trainer(objective, rows: int = 0, **arguments) -> AlignmentTrainer:
        return AlignmentTrainer(
            model=AlignmentModel(towers, objective),
            args=AlignmentArguments(output_dir=str(tmp_path), use_cpu=True, **arguments),
            data_collator=AlignmentCollator(avworld_processor, UNCHANGED, frame=0),
            train_dataset=list(range(rows)) or None,
            stage="align",
        )

    return make_trainer


def test_optimiser_is_one_adam_over_the_tower(make_trainer):
    trainer = make_trainer(MMDLoss())
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.Adam and trainer.create_optimizer() is optimizer
    (group,) = optimizer.param_groups
    tower = list(trainer.pretrained.audio_tower.parameters())
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in tower]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.95, 0.999), 5e-7)
    assert not group["decoupled_weight_decay"]


def test_wrapped_module_is_the_towers_and_the_objective(make_trainer):
    trainer = make_trainer(AttentiveTransportLoss(width=32, num_heads=4))
    names = {".".join(name.split(".")[:2]) for name, _ in trainer.model.named_parameters()}
    assert names == {"towers.vision_tower", "towers.audio_tower", "objective.attention"}


def test_objectives_own_parameters_are_a_group_at_a_constant_rate(make_trainer):
    trainer = make_trainer(AttentiveTransportLoss(width=32, num_heads=4), halve_every=5)
    tower, own = trainer.create_optimizer().param_groups
    assert {id(p) for p in own["params"]} == {id(p) for p in trainer.model.objective.parameters()}
    assert len(own["params"]) == 6 * 2 + 2 * 4  # six linear layers, two attentions
    assert own["constant_rate"] and "constant_rate" not in tower
    assert own["lr"] == tower["lr"] == 1e-4 and own["weight_decay"] == 0.0
    assert make_trainer(AttentiveTransportLoss(width=32, num_heads=4)).args.objective_learning_rate == 1e-4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("adafactor", Adafactor),
    ],
)
def test_named_optimizer_has_the_same_groups(make_trainer, name, expected):
    objective = AttentiveTransportLoss(width=32, num_heads=4)
    options = {"learning_rate": 2e-3, "weight_decay": 0.1, "objective_learning_rate": 3e-4}
    trainer = make_trainer(objective, optim=name, **options)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is expected
    tower, own = optimizer.param_groups
    assert [id(p) for p in tower["params"]] == [id(p) for p in trainer.pretrained.audio_tower.parameters()]
    assert [id(p) for p in own["params"]] == [id(p) for p in objective.parameters()]
    assert (tower["lr"], tower["weight_decay"]) == (2e-3, 0.1)
    assert (own["lr"], own["weight_decay"], own["constant_rate"]) == (3e-4, 0.0, True)


def test_decoupled_decay_shrinks_the_weight(make_trainer):
    """One step of AdamW: the weight times 1 - rate * decay, minus rate * sign(gradient)."""
    trainer = make_trainer(MMDLoss(), optim="adamw_torch", weight_decay=0.1, learning_rate=1e-3)
    optimizer = trainer.create_optimizer()
    weight = trainer.pretrained.audio_tower.proj.weight
    before = weight.detach().double().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    expected = before * (1 - 1e-3 * 0.1) - 1e-3 * weight.grad.double().sign()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)


def test_optimizers_that_cannot_serve_are_errors(make_trainer):
    with pytest.raises(ValueError, match="optim: unknown optimizer 'adma'; known: adam, adamw_torch, "):
        make_trainer(MMDLoss(), optim="adma")
    trainer = make_trainer(MMDLoss(), optim="galore_adamw", optim_target_modules=["attention"])
    trainer.get_optimizer_cls_and_kwargs = lambda *_: (torch.optim.AdamW, {"lr": 1e-3, "params": []})  # as with GaLore
    with pytest.raises(ValueError, match="optim: .*galore_adamw.* creates its own parameter groups"):
        trainer.create_optimizer()


def test_arguments_keep_the_optimizers_name(make_trainer):
    assert make_trainer(MMDLoss()).args.optim == "adam"
    assert make_trainer(MMDLoss()).args.to_dict()["optim"] == "adam"


def test_attention_waits_unchanged_through_the_first_epoch(make_trainer, towers, avworld_processor, rows):
    """The attention's gradient is zero, and no weight decay changes it. The tower learns."""
    objective = AttentiveTransportLoss(width=32, num_heads=4)
    trainer = make_trainer(objective, weight_decay=5e-7, learning_rate=1e-2, objective_learning_rate=1e-2)
    optimizer = trainer.create_optimizer()
    batch = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)(rows)
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    tower = towers.audio_tower.proj.weight.detach().clone()
    for epoch in (1, 1, 2):
        objective.set_epoch(epoch)
        optimizer.zero_grad()
        trainer.model.train()(batch["pixel_values"], batch["input_features"]).loss.backward()
        optimizer.step()
        unchanged = [torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=True)]
        assert all(unchanged) if epoch == 1 else not any(unchanged[:4])
    assert not torch.equal(tower, towers.audio_tower.proj.weight)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_objectives_rate_is_constant_under_any_schedule(make_trainer, kind):
    objective = AttentiveTransportLoss(width=32, num_heads=4)
    options = {"lr_scheduler_type": kind, "warmup_steps": 3, "objective_learning_rate": 3e-4}
    found = rates(make_trainer(objective, learning_rate=2e-3, **options), 10)
    assert [own for _, own in found] == [3e-4] * 10
    assert found[0][0] == 0.0 and max(tower for tower, _ in found) == 2e-3


def test_weight_decay_is_added_to_the_gradient(make_trainer):
    """One step changes every weight by rate * g / (|g| + eps), with g = gradient + decay * weight."""
    trainer = make_trainer(MMDLoss(), weight_decay=0.1, learning_rate=1e-3)
    optimizer = trainer.create_optimizer()
    weight = trainer.pretrained.audio_tower.proj.weight
    before = weight.detach().double().clone()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.01
    weight.grad = gradient.clone()
    optimizer.step()
    coupled = gradient.double() + 0.1 * before
    expected = before - 1e-3 * coupled / (coupled.abs() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)
    opposed = coupled.sign() != gradient.double().sign()
    assert opposed.any()  # where decoupled decay would have the opposite sign


def rates(trainer, steps: int) -> list[list[float]]:
    """Returns the learning rates of the groups at every step of a training."""
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(steps, optimizer)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    "length",
    [
        {"num_train_epochs": 20},
        {"max_steps": 140, "num_train_epochs": 3},  # num_train_epochs is then unused
        {"max_steps": 140, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        # thirteen batches: seven steps, the last of one batch
        {"max_steps": 140, "rows": 26, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
)
def test_rate_halves_at_epochs_10_and_15(make_trainer, length):
    objective = AttentiveTransportLoss(width=32, num_heads=4)
    options = {"rows": 28, "per_device_train_batch_size": 4} | length
    trainer = make_trainer(objective, learning_rate=2e-4, halve_from=10, halve_every=5, **options)
    per_epoch = 7
    found = rates(trainer, 20 * per_epoch)
    for step, (tower, own) in enumerate(found):
        epoch = step // per_epoch
        factor = 1.0 if epoch < 10 else 0.5 if epoch < 15 else 0.25
        assert tower == pytest.approx(2e-4 * factor, rel=1e-12), epoch
        assert own == 1e-4


def test_without_halving_the_rate_follows_the_named_schedule(make_trainer):
    trainer = make_trainer(MMDLoss(), learning_rate=2e-4, lr_scheduler_type="linear", warmup_steps=0)
    found = [tower for (tower,) in rates(trainer, 8)]
    assert found == pytest.approx([2e-4 * (1 - step / 8) for step in range(8)])


def test_image_tokens_stand_for_their_pictures(towers, avworld_processor, rows):
    model = AlignmentModel(towers, MMDLoss()).eval()
    batch = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)(rows)
    pixels, features = batch["pixel_values"], batch["input_features"]
    with torch.no_grad():
        tokens = towers.encode_image(pixels)
    loss = model(input_features=features, image_tokens=tokens).loss
    assert torch.equal(loss, model(pixels, features).loss)


def test_model_compares_the_tokens_of_both_towers(towers, avworld_processor, rows):
    batch = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)(rows)
    objective = MMDLoss()
    output = AlignmentModel(towers, objective).eval()(batch["pixel_values"], batch["input_features"])
    image = towers.encode_image(batch["pixel_values"])
    audio = towers.encode_audio(batch["input_features"])
    assert (audio.shape, image.shape) == ((4, 64, 32), (4, 36, 32))
    expected = objective(audio, image)
    assert torch.equal(output.loss, expected.loss) and output.logs == expected.logs


def test_padded_clips_align_as_they_would_alone(towers, avworld_processor, rows):
    batch = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)(rows[:2])
    model = AlignmentModel(towers, MMDLoss()).eval()
    mask = torch.arange(256)[None] < torch.tensor([[256], [96]])
    pixels, features = batch["pixel_values"], batch["input_features"]
    with torch.no_grad():
        together = model(pixels, features, mask).loss
        alone = [model(pixels[:1], features[:1]).loss, model(pixels[1:], features[1:, :96]).loss]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-6)


def test_frozen_vision_tower_stays_in_eval_mode(towers):
    model = AlignmentModel(towers, MMDLoss())
    model.train()
    assert towers.audio_tower.training and not towers.vision_tower.training
    model.eval()
    assert not towers.audio_tower.training


def test_evaluation_gives_the_loss_and_no_gradient(make_trainer, avworld_processor, rows):
    trainer = make_trainer(MMDLoss())
    batch = trainer.data_collator(rows)
    trainer.model.eval()
    loss, logits, labels = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=True)
    assert (logits, labels) == (None, None) and not loss.requires_grad
    assert torch.equal(loss, trainer.model(batch["pixel_values"], batch["input_features"]).loss.detach())


@pytest.mark.parametrize("index", [0, 1])
def test_first_process_alone_saves(make_trainer, tmp_path, monkeypatch, index):
    """The trainer calls it in every process. Two writers would take each other's unfinished files."""
    trainer = make_trainer(AttentiveTransportLoss(width=32, num_heads=4), base_model="base")
    monkeypatch.setattr(AlignmentArguments, "process_index", index)
    trainer.save_model(str(tmp_path / "saved"))
    files = {"stage.json", "stage.safetensors", "alignment_attention.safetensors"}
    assert {path.name for path in tmp_path.glob("saved/*")} & files == (files if index == 0 else set())


def test_alignment_lowers_its_loss(run_stage, run_dir, tmp_path):
    """Twelve steps on four clips, without augmentation or warm-up."""
    words = ["--max_steps", "12", "--max_samples", "4", "--augmentation_noise", "0", "--augmentation_roll", "0"]
    rate = [
        "--learning_rate",
        "3e-3",
        "--lr_scheduler_type",
        "constant",
        "--warmup_steps",
        "0",
        "--logging_steps",
        "1",
    ]
    trainer = run_stage("aligned", run_dir / "prefix", tmp_path / "out", *words, *rate)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]


@pytest.fixture
def epochs(monkeypatch) -> list[int]:
    """The epochs that `AttentiveTransportLoss` receives, one per step."""
    told = []
    set_epoch = AttentiveTransportLoss.set_epoch

    def note(self, epoch: int) -> None:
        told.append(epoch)
        set_epoch(self, epoch)

    monkeypatch.setattr(AttentiveTransportLoss, "set_epoch", note)
    return told


def align_attentively(run_stage, run_dir, output, *words: str) -> AlignmentTrainer:
    return run_stage("aligned", run_dir / "prefix", output, "--objective", "ot_att", "--logging_steps", "1", *words)


def test_schedule_spreads_its_epochs_over_the_steps(run_stage, run_dir, tmp_path, epochs):
    """Epochs 1 to 6 in twelve steps, although the data is read three times. Lambda follows, in mean distances."""
    trainer = align_attentively(run_stage, run_dir, tmp_path / "out", "--max_steps", "12")
    assert trainer.args.schedule_epochs == 6
    assert epochs == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    logs = [entry for entry in trainer.state.log_history if "lambda" in entry]
    relative = [entry["lambda"] / entry["mean_distance"] for entry in logs]
    expected = [weight for weight in (0, 0.25, 0.2, 0.15, 0.1, 0.05) for _ in range(2)]
    assert relative == pytest.approx(expected, abs=1e-6)


def test_schedule_follows_the_datas_epochs_by_default(run_stage, run_dir, tmp_path, epochs):
    """Sixteen rows, four per step."""
    config = tmp_path / "align.yaml"
    config.write_text("split: train\n")
    words = ["--output_dir", str(tmp_path / "out"), "--base_model", str(run_dir / "prefix"), "--objective", "ot_att"]
    size = ["--dataset_options", '{"sizes": {"train": 16}}', "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    align.main([str(config), *words, *size, "--max_steps", "10", "--disable_tqdm", "true"])
    assert epochs == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_uneven_steps_still_reach_the_last_epoch(epochs):
    objective = AttentiveTransportLoss(width=32, num_heads=4)
    callback = ScheduleEpochs(objective, epochs=3)
    for step in range(7):
        callback.on_step_begin(None, TrainerState(global_step=step, max_steps=7), None)
    assert epochs == [1, 1, 1, 2, 2, 3, 3] and objective.epoch == 3


def test_objectives_without_a_schedule_are_told_no_epoch(make_trainer):
    def told(trainer) -> bool:
        return any(isinstance(callback, ScheduleEpochs) for callback in trainer.callback_handler.callbacks)

    assert not told(make_trainer(MMDLoss(), schedule_epochs=6))
    assert told(make_trainer(AttentiveTransportLoss(width=32, num_heads=4)))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["ot", "ot_att"])
def test_micro_batches_give_the_loss_and_gradients_of_the_batch(towers, avworld_processor, rows, name, cached):
    batch = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)(rows)
    batch.pop("id")  # the trainer's, not the model's
    batch["input_features_mask"] = torch.arange(256)[None] < torch.tensor([[256], [96], [160], [256]])
    if cached:
        batch["image_tokens"] = towers.encode_image(batch.pop("pixel_values")).detach()
    objective = LOSSES[name].from_captioner(towers, **({"temperature": 0.05} if name == "ot_att" else {}))
    if name == "ot_att":
        objective.set_epoch(2)
    encoded = []
    towers.audio_tower.register_forward_hook(lambda module, inputs, output: encoded.append(len(output[0])))

    found = []
    for count in (1, 3):
        model = AlignmentModel(towers, objective, transport_micro_batches=count).train()
        output = model(**batch)
        model.zero_grad()
        output.loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append((output.loss, [parameter.grad.clone() for parameter in trained]))
    assert encoded == [4, 2, 2]
    (loss, gradients), (split_loss, split_gradients) = found
    torch.testing.assert_close(split_loss, loss, rtol=1e-5, atol=0)
    for gradient, expected in zip(split_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item() + 1e-7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "mmd", "--transport_micro_batches", "2"], "objective mmd solves no transport"),
        (
            ["--objective", "ot", "--transport_micro_batches", "0"],
            "transport_micro_batches: .* at least 1, not 0",
        ),
    ],
)
def test_micro_batches_that_cannot_be_are_errors(stage_words, run_dir, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        align.main(stage_words("aligned", run_dir / "prefix", tmp_path / "out", *words))
