"""
Before the alignment: pretrain an audio tower with random weights on sounds alone, without pictures or text.

The tower learns to predict statistics of its spectrograms (a regression, as in PASE). At full size, a CAV-MAE
checkpoint replaces this stage. Only the audio tower trains.

    accelerate launch train/avworld/pretrain_tower.py train/configs/avworld/pretrain_tower.yaml \
        --base_model runs/prefix --output_dir runs/tower
"""

from itertools import islice

from transformers import set_seed

from dali_llava.modeling import LlavaAudioTowers
from dali_llava.train.avworld.sound_statistics import StatisticsLoss
from dali_llava.train.avworld.tower import SoundCollator, TowerArguments, TowerModel
from dali_llava.train.base_model import check_base, load_base
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.clips import ClipOpener
from dali_llava.train.data.corpus import evaluation_rows, open_rows, shuffled, store_features
from dali_llava.train.data.draws import Draws
from dali_llava.train.trainers import StageTrainer
from dali_llava.train.trainers.checkpoints import check_resume


def main(argv: list[str] | None = None) -> StageTrainer:
    arguments = parse_stage_arguments(TowerArguments, __doc__, argv)
    if arguments.examples < 2:
        raise ValueError(f"examples: {arguments.examples} rows have no standard deviation; give at least 2.")
    if arguments.cache_features == "disk":
        raise ValueError("cache_features: this stage uses no image tokens, which disk stores; choose none or all.")
    check_resume(arguments, "tower")
    set_seed(arguments.seed)
    check_base(arguments)
    rows = open_rows(arguments, pictures=arguments.cache_features == "all")
    held_out = evaluation_rows(arguments)
    towers, processor = load_base(arguments, LlavaAudioTowers, trained=["audio_tower"])
    rows = store_features(rows, towers, processor, arguments)
    if held_out is not None:
        held_out = store_features(held_out, towers, processor, arguments, arguments.eval_split)
    augmentation = arguments.augmentation(mix=arguments.augmentation_mix, unit=processor.feature_extractor.nats)
    draws = Draws(arguments.seed, arguments.streaming)
    collator = SoundCollator(processor, augmentation, ClipOpener(rows), draws)
    train_dataset = shuffled(rows, arguments)
    examples = collator(list(islice(train_dataset, arguments.examples)))["input_features"]
    objective = StatisticsLoss(towers.config.audio_config.output_size, examples)
    return StageTrainer(
        model=TowerModel(towers, objective),
        pretrained=towers,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=processor,
        stage="tower",
    ).train_and_save()


if __name__ == "__main__":
    run_stage(main)
