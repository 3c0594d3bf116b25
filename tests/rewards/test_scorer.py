"""A small classifier made here: its scores alone and in batches, and folders that aren't one."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from vrlt_fast.config_rl import ScorerConfig
from vrlt_fast.errors import ConfigError, SetupError
from vrlt_fast.rewards.scorer import Scorer, in_0_1

WORDS = ["a", "box", "door", "opens", "the", "red", "then", "person", "closes"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(one_torch_thread):
    pass


def build(folder, labels, *, kind="BertForSequenceClassification", seed=0):
    """A random BERT of 2 layers with a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=48,
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        num_labels=labels,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6.0)  # sharper, so that texts make a difference
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scorers")
    return {labels: build(root / str(labels), labels) for labels in (1, 3)}


def pairs_of(seed, count, longest):
    rng = random.Random(seed)
    return [tuple(" ".join(rng.choices(WORDS, k=rng.randint(0, longest))) for _ in range(2)) for _ in range(count)]


@pytest.mark.parametrize("labels", [1, 3])
def test_batches_score_as_one_by_one(folders, labels, seed):
    scorer = Scorer(ScorerConfig(model=str(folders[labels])), CPU, batch=7)
    pairs = pairs_of(seed, 40, 20)
    together = scorer.score(pairs + pairs[:3])
    alone = [scorer.score([pair])[0] for pair in pairs]
    assert together == pytest.approx(alone + alone[:3], abs=1e-5)
    assert all(0.0 <= value <= 1.0 for value in alone)
    assert len({round(value, 4) for value in alone}) > 20
    assert scorer.score([]) == []


@pytest.mark.parametrize("labels", [1, 3])
def test_the_score_is_that_of_transformers(folders, labels):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[labels])
    model = AutoModelForSequenceClassification.from_pretrained(folders[labels]).eval()
    logits = model(**tokenizer("the red box", "a door", return_tensors="pt")).logits[0]
    wanted = logits.sigmoid()[0] if labels == 1 else logits.softmax(-1)[-1]
    found = Scorer(ScorerConfig(model=str(folders[labels])), CPU).score([("the red box", "a door")])
    assert found == pytest.approx([wanted.item()], abs=1e-6)
    swapped = Scorer(ScorerConfig(model=str(folders[labels])), CPU).score([("a door", "the red box")])
    assert swapped != pytest.approx(found, abs=1e-4)


def test_logits_by_hand():
    assert in_0_1(torch.tensor([[0.0], [20.0]])).tolist() == pytest.approx([0.5, 1.0])
    assert in_0_1(torch.tensor([[0.0, 0.0], [0.0, 1.0986123]])).tolist() == pytest.approx([0.5, 0.75])


def test_long_texts_are_cut(folders):
    scorer = Scorer(ScorerConfig(model=str(folders[1]), max_length=512), CPU)
    assert scorer.max_length == 48
    (long,) = scorer.score([("the red box", "door " * 5000 + "\ud800")])
    assert long == pytest.approx(scorer.score([("the red box", "door " * 60)])[0])
    short = Scorer(ScorerConfig(model=str(folders[1]), max_length=8), CPU)
    assert short.score([("a box", "door opens then closes")]) == short.score([("a box", "door opens then a")])


def test_an_output_that_is_no_number_is_counted(folders):
    warnings = []
    scorer = Scorer(ScorerConfig(model=str(folders[1])), CPU, warn=warnings.append)
    with torch.no_grad():
        scorer._model.classifier.bias.fill_(float("nan"))
    assert scorer.score([("a", "box"), ("a", "door")]) == [0.0, 0.0]
    assert len(warnings) == 1
    assert scorer.counts == {"nan": 2}


def code_of(folder):
    with pytest.raises((ConfigError, SetupError)) as caught:
        Scorer(ScorerConfig(model=str(folder)), CPU)
    return caught.value.code


def test_folders_that_are_no_scorer(folders, tmp_path):
    assert code_of("") == "VRLT-C04"
    assert code_of(tmp_path / "nowhere") == "VRLT-M01"
    pickled = shutil.copytree(folders[1], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert code_of(pickled) == "VRLT-M01"
    assert code_of(build(tmp_path / "headless", 1, kind="BertModel")) == "VRLT-M04"
    torn = shutil.copytree(folders[1], tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"x" * 100)
    assert code_of(torn) == "VRLT-M04"
    wordless = shutil.copytree(folders[1], tmp_path / "wordless")
    (wordless / "tokenizer.json").write_text("{", encoding="utf-8")
    assert code_of(wordless) == "VRLT-M03"
