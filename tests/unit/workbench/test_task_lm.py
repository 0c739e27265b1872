"""Language modelling: the stream, the blocks, and a loss that equals the naive one."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from increlora.errors import TaskError
from increlora.workbench.tasks import lm as lm_module
from increlora.workbench.tasks import load_causal, load_task
from increlora.workbench.tasks.lm import PIECE, causal_loss, right_padding, tokens

WORDS = "one two three four five six seven eight nine ten"


@pytest.fixture
def tokenizer(word_tokenizer):
    return word_tokenizer(WORDS)


@pytest.fixture
def documents(tmp_path):
    """(texts by split) → a folder with a file of rows for each."""

    def write(**texts):
        for split, rows in texts.items():
            (tmp_path / f"{split}.json").write_text(json.dumps([{"text": row} for row in rows]))
        return tmp_path

    return write


def words(tokenizer, examples):
    return [" ".join(tokenizer.convert_ids_to_tokens(example["input_ids"])) for example in examples]


def tiny_gpt2(tokenizer):
    """Learned positions, so that padding in front would be noticed."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=1.0,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


# -------------------------------------------------------------------------------------------------- stream and blocks


def test_documents_end_with_the_end_token_and_are_cut_into_blocks(tokenizer, documents):
    task = load_task(
        "lm", tokenizer, data=documents(train=["one two three", "four five"], dev=["six seven"]), max_length=4
    )
    assert words(tokenizer, task.train) == ["one two three </s>", "four five </s>"]
    assert words(tokenizer, task.validation) == ["six seven </s>"]
    assert all(example["labels"] == example["input_ids"] for example in task.train)


def test_a_tokenizer_that_opens_texts_separates_by_its_opening_token_alone(word_tokenizer, documents):
    tokenizer = word_tokenizer(WORDS, opening=True)
    task = load_task("lm", tokenizer, data=documents(train=["one two three", "four five"], dev=["six"]), max_length=4)
    assert words(tokenizer, task.train) == ["<s> one two three", "<s> four five"]


def test_empty_documents_are_none_and_a_last_block_of_one_token_is_left_out(tokenizer, documents):
    folder = documents(train=["", " \n", "one two three four"], dev=["five six"])
    assert words(tokenizer, load_task("lm", tokenizer, data=folder, max_length=4).train) == ["one two three four"]


def test_a_long_document_is_read_in_pieces_that_lose_nothing(tokenizer, word_tokenizer, monkeypatch):
    monkeypatch.setattr(lm_module, "PIECES_AT_ONCE", 3)
    text = "\n".join([WORDS] * 1500)
    assert len(PIECE.findall(text)) > 3 and "".join(PIECE.findall(text)) == text
    assert all(piece.endswith("\n") for piece in PIECE.findall(text)[:-1])
    once = tokenizer(text, verbose=False).input_ids
    assert list(tokens(tokenizer, [text, "one"])) == [*once, 1, *tokenizer("one").input_ids, 1]
    opened = list(tokens(word_tokenizer(WORDS, opening=True), [text, "one"]))
    assert opened == [0, *once, 0, *tokenizer("one").input_ids]
    for hard in ("x" * 25_000, "\n" * 25_000, "x"):
        assert "".join(PIECE.findall(hard)) == hard


def test_no_more_text_is_tokenized_than_the_limit_asks_for(tokenizer, documents, monkeypatch):
    read = []
    token_ids = lm_module.token_ids
    monkeypatch.setattr(lm_module, "PIECES_AT_ONCE", 2)
    monkeypatch.setattr(lm_module, "token_ids", lambda t, texts: read.extend(texts) or token_ids(t, texts))
    folder = documents(train=["one two three"] * 50, dev=["four five six"] * 3)
    task = load_task("lm", tokenizer, data=folder, max_length=4, max_train_samples=5, max_eval_samples=2)
    assert len(task.train) == 5 and len(task.validation) == 2
    assert read.count("one two three") == 6


def test_validation_blocks_are_a_fixed_sample_of_all(tokenizer, documents):
    folder = documents(train=WORDS.split(), dev=WORDS.split())
    options = {"data": folder, "max_length": 2, "max_eval_samples": 3}
    a, b = (load_task("lm", tokenizer, seed=seed, **options).validation for seed in (0, 1))
    assert a == b and words(tokenizer, a) != [f"{word} </s>" for word in WORDS.split()[:3]]


# ------------------------------------------------------------------------------------------------- without validation


def test_the_last_twentieth_of_many_documents_is_held_out(tokenizer, documents):
    task = load_task("lm", tokenizer, data=documents(train=["one two"] * 38 + ["three four"] * 2), max_length=3)
    assert words(tokenizer, task.validation) == ["three four </s>"] * 2
    assert words(tokenizer, task.train) == ["one two </s>"] * 38
    assert "without its last twentieth" in task.source


def test_the_end_of_each_text_is_held_out_where_they_are_few(tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one two\n" * 190 + "ten two\n" * 10)
    task = load_task("lm", tokenizer, data=path, max_length=7)
    assert words(tokenizer, task.train)[-1] == "one two </s>"
    assert words(tokenizer, task.validation) == [
        "ten two ten two ten two ten",
        "two ten two ten two ten two",
        "ten two ten two ten two </s>",
    ]


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("batch_size", (1, 4))
@torch.no_grad()
def test_the_perplexity_equals_a_naive_loop_in_float64(tokenizer, documents, batch_size):
    folder = documents(train=["one"] * 2, validation=[WORDS, WORDS[::-1], "two two three four six ten"])
    task = load_task("lm", tokenizer, data=folder, max_length=9)
    model = tiny_gpt2(tokenizer).double()
    losses = []
    for example in task.validation:
        ids = torch.tensor([example["input_ids"]])
        log_p = model(ids).logits[0].log_softmax(-1)
        losses += [-float(log_p[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)]
    expected = math.fsum(losses) / len(losses)
    assert {len(e["input_ids"]) for e in task.validation} != {9}, "one block at least must be padded"
    numbers = task.evaluate(model, batch_size=batch_size)
    assert numbers["eval_loss"] == pytest.approx(expected, rel=1e-12)
    assert numbers["perplexity"] == pytest.approx(math.exp(expected), rel=1e-12)
    assert task.metric == "perplexity" and not task.higher_is_better


@torch.no_grad()
def test_batches_are_padded_behind_the_text_and_training_ignores_the_padding(tokenizer):
    collate = right_padding(tokenizer)
    assert tokenizer.padding_side == "left"
    examples = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}, {"input_ids": [6, 1], "labels": [6, 1]}]
    batch = collate(examples)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 1, 1]] and batch["attention_mask"].tolist()[1] == [1, 1, 0]
    assert batch["labels"].tolist() == [[3, 4, 5], [6, 1, -100]]
    assert examples[1]["labels"] == [6, 1]
    model = tiny_gpt2(tokenizer)
    assert causal_loss(model, [batch])["eval_loss"] == pytest.approx(float(model(**collate(examples)).loss), rel=1e-6)


@torch.no_grad()
def test_losses_of_half_precision_logits_are_summed_in_more(tokenizer):
    model = tiny_gpt2(tokenizer).bfloat16()
    batch = right_padding(tokenizer)([{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}])
    log_p = model(batch["input_ids"]).logits[0].double().log_softmax(-1)
    expected = -float(log_p[range(3), [4, 5, 6]].mean())
    assert causal_loss(model, [batch])["eval_loss"] == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_a_diverged_model_has_an_infinite_perplexity(tokenizer):
    model = tiny_gpt2(tokenizer)
    model.transformer.wte.weight.data.mul_(1e4)
    batch = right_padding(tokenizer)([{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}])
    assert causal_loss(model, [batch])["perplexity"] == math.inf


# ------------------------------------------------------------------------------------------------------- the real data


def test_a_model_of_tinystories_finds_them_as_likely_as_documented(data, stories):
    model, tokenizer = load_causal(str(stories))
    file = data / "lm/tinystories/train_v2gpt4.parquet"
    task = load_task("lm", tokenizer, data=file, max_length=512, max_train_samples=2, max_eval_samples=8)
    assert tokenizer.decode(task.train[0]["input_ids"]).startswith("<s> Once upon a time")
    assert 1.3 < task.evaluate(model, batch_size=4)["eval_loss"] < 1.6  # 1.30 to 1.50 are documented for such stories


def test_one_row_of_shakespeare_gives_two_parts(data, stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    task = load_task("lm", tokenizer, data=data / "lm/tinyshakespeare", max_length=64, max_train_samples=3)
    assert tokenizer.decode(task.train[0]["input_ids"]).startswith("<s> First Citizen:\nBefore we proceed")
    assert 400 < len(task.validation) < 700


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "content, message",
    (
        ([{"a": "x", "b": "y"}] * 3, "its columns of text are a, b; lm reads the one called 'text': rename it"),
        ([{"a": 1}] * 3, "its columns of text are none"),
        ([{"text": "one"}, {"text": None}, {"text": "two"}], "column 'text' is null at row 1"),
        ([{"text": " "}] * 3, "too short for a training and a validation part; add text"),
    ),
)
def test_a_table_without_enough_text_is_refused(tokenizer, tmp_path, content, message):
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(TaskError, match=message):
        load_task("lm", tokenizer, data=tmp_path, max_length=8)


def test_the_only_column_of_text_needs_no_name(tokenizer, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"story": "one two", "n": 1}] * 40))
    assert len(load_task("lm", tokenizer, data=tmp_path / "x.json", max_length=3).train) == 38
