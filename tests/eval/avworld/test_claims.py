"""The claims of the paper, with figures for which they hold and figures for which they fail."""

import itertools

import pytest

from dali_llava.eval.avworld import claims as check
from dali_llava.eval.avworld.comparison import method_claims
from dali_llava.eval.results import Row


def make_row(method="ot_att", stage="aligned", modality="audio", split="test", n=400, **metrics) -> Row:
    return Row(method, stage, modality, split, 0, n, metrics)


@pytest.mark.parametrize(
    ("claim", "verdict", "measured"),
    [
        (check.names_sources(make_row(sound_recall=0.70)), "holds", "0.700"),
        (check.names_sources(make_row(sound_recall=0.699)), "fails", "0.699"),
        (
            check.above_contrastive(make_row(cider_d=1.5), make_row("contrastive", cider_d=1.0)),
            "holds",
            "1.500 against 1.000, 1.50 times",
        ),
        (
            check.above_contrastive(make_row(cider_d=1.0), make_row(cider_d=1.0)),
            "fails",
            "1.000 against 1.000, 1.00 times",
        ),
        (check.above_contrastive(make_row(cider_d=0.5), make_row(cider_d=0.0)), "holds", "0.500 against 0.000"),
        (
            check.senses_add_up(make_row(cider_d=2.0), make_row(cider_d=1.0), make_row(cider_d=1.9)),
            "holds",
            "2.000 against 1.000 and 1.900",
        ),
        (
            check.senses_add_up(make_row(cider_d=2.0), make_row(cider_d=1.0), make_row(cider_d=2.1)),
            "fails",
            "2.000 against 1.000 and 2.100",
        ),
        (check.distillation_lifts(make_row(cider_d=1.0), make_row(cider_d=1.2)), "holds", "1.000 to 1.200"),
        (check.distillation_lifts(make_row(cider_d=1.2), make_row(cider_d=1.0)), "fails", "1.200 to 1.000"),
        (check.less_visual_bias(make_row(visual_bias=0.1), make_row(visual_bias=0.4)), "holds", "0.100 against 0.400"),
        (check.less_visual_bias(make_row(visual_bias=0.4), make_row(visual_bias=0.4)), "fails", "0.400 against 0.400"),
        (check.closes_gap("mmd", {"mmd": 0.2, "contrastive": 3.0}), "holds", "0.20 against 3.00"),
        (check.closes_gap("mmd", {"mmd": 3.2, "contrastive": 3.0}), "fails", "3.20 against 3.00"),
        (check.hears_recordings(make_row(sound_recall=0.80, n=80)), "holds", "0.800 of 80"),
        (check.hears_recordings(make_row(sound_recall=0.79, n=80)), "fails", "0.790 of 80"),
    ],
)
def test_verdict_and_figures(claim, verdict, measured):
    assert (claim.verdict, claim.measured) == (verdict, measured)


def test_a_runs_claims_are_those_of_the_methods_that_ran():
    def table(methods):
        rows = [make_row("untrained", "prefix", sound_recall=0.1)]
        rows += [make_row("image_only", "prefix", "image", cider_d=1.0)]
        for system in itertools.product(methods, ("aligned", "distilled"), ("audio", "audiovisual")):
            rows.append(make_row(*system, cider_d=1.0, sound_recall=0.7, visual_bias=0.2))
        return {(row.method, row.stage, row.modality, row.split): row for row in rows}

    alone = [claim.claim for claim in method_claims(table(["mmd"]), ["mmd"], {"mmd": 0.3})]
    assert len(alone) == 1 + 2 + 1 and not any("contrastive" in text for text in alone)
    methods = ["contrastive", "mmd", "ot", "ot_att"]
    everything = [claim.claim for claim in method_claims(table(methods), methods, dict.fromkeys(methods, 0.3))]
    assert len(everything) == len(set(everything)) == 4 + 1 + 2 * (3 + 4) + 4 + 1 + 3
    heard = {("ot_att", "aligned", "audio", "esc10_fold4"): make_row(split="esc10_fold4", sound_recall=0.9)}
    recorded = [claim.claim for claim in method_claims(table(["mmd"]) | heard, ["mmd"], {"mmd": 0.3})]
    assert recorded[: len(alone)] == alone and "ESC-10" in recorded[-1]
