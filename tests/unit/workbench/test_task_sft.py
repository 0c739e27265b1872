"""Instruction pairs: what the model reads, and that it learns the response and nothing else."""

import json

import pytest
from transformers import AutoTokenizer

from increlora.errors import TaskError
from increlora.workbench.tasks import load_task

WORDS = "one two three four five six seven eight nine ten user bot end"
ALPACA = [
    {"instruction": "one two", "input": "three", "output": "four five"},
    {"instruction": "six", "input": "", "output": "seven"},
]


@pytest.fixture
def tokenizer(word_tokenizer):
    return word_tokenizer(WORDS)


@pytest.fixture
def load(tmp_path, tokenizer):
    """(rows, other options) → the task with these rows for training and for validation."""

    def make(rows, *, tokenizer=tokenizer, **options):
        for split in ("train", "validation"):
            (tmp_path / f"{split}.json").write_text(json.dumps(rows))
        return load_task("sft", tokenizer, data=tmp_path, **{"max_length": 32, **options})

    return make


def read(tokenizer, example):
    """What is read and what is learnt of an example, as text."""
    return tokenizer.decode(example["input_ids"]), learnt(tokenizer, example)


def learnt(tokenizer, example):
    """The labels as text; they must be the last tokens of the input."""
    labels = [label for label in example["labels"] if label != -100]
    assert example["labels"][-len(labels) :] == labels == example["input_ids"][-len(labels) :]
    assert len(example["labels"]) == len(example["input_ids"])
    return tokenizer.decode(labels)


# --------------------------------------------------------------------------------------------------------- the layouts


@pytest.mark.parametrize(
    "columns", (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
)
def test_every_layout_is_known_by_its_columns(load, tokenizer, columns):
    task = load([dict(zip(columns, pair)) | {"id": 7} for pair in (("one two", "three four"), ("five", "six"))])
    assert [read(tokenizer, example) for example in task.train] == [
        ("one two three four </s>", "three four </s>"),
        ("five six </s>", "six </s>"),
    ]
    assert task.metric == "eval_loss" and not task.higher_is_better


def test_alpacas_input_follows_the_instruction_where_there_is_one(load, tokenizer):
    task = load([*ALPACA, {"instruction": "eight", "input": None, "output": "nine"}])
    assert [read(tokenizer, example)[0] for example in task.train] == [
        "one two three four five </s>",
        "six seven </s>",
        "eight nine </s>",
    ]
    task = load([{"instruction": "eight", "input": None, "output": "nine"}] * 2)
    assert read(tokenizer, task.train[0])[0] == "eight nine </s>"


def test_a_tokenizer_that_opens_texts_opens_the_prompt_and_not_the_response(load, word_tokenizer):
    tokenizer = word_tokenizer(WORDS, opening=True)
    assert read(tokenizer, load(ALPACA, tokenizer=tokenizer).train[1]) == ("<s> six seven </s>", "seven </s>")


def test_a_chat_template_is_used_and_its_own_end_is_learnt(load, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'user ' if m.role == 'user' else 'bot ' }}{{ m.content }} end {% endfor %}"
        "{% if add_generation_prompt %}{{ 'bot ' }}{% endif %}"
    )
    assert read(tokenizer, load(ALPACA).train[0]) == (
        "user one two three end bot four five end",
        "four five end",
    )


def test_what_a_template_adds_for_generation_alone_is_not_in_the_prompt(load, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'user ' if m.role == 'user' else 'bot ' }}{{ m.content }} end {% endfor %}"
        "{% if add_generation_prompt %}{{ 'bot ten ' }}{% endif %}"
    )
    assert read(tokenizer, load(ALPACA).train[1]) == ("user six end bot seven end", "seven end")


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_a_long_prompt_loses_its_beginning_and_the_response_nothing(load, word_tokenizer):
    tokenizer = word_tokenizer(WORDS, opening=True)
    rows = [{"prompt": "one two three four", "response": "five six"}] * 2
    task = load(rows, tokenizer=tokenizer, max_length=6)
    assert [read(tokenizer, example) for example in task.train] == [
        ("<s> three four five six </s>", "five six </s>")
    ] * 2
    assert task.source.endswith(", 4 prompts cut")
    assert read(tokenizer, load(rows, tokenizer=tokenizer, max_length=5).train[0])[0] == "<s> four five six </s>"


def test_what_is_left_out_is_counted_in_the_record(load, tokenizer):
    rows = [
        {"prompt": "one", "response": "two"},
        {"prompt": "one", "response": "two three four five"},
        {"prompt": "", "response": "two"},
        {"prompt": "one", "response": " "},
        {"prompt": "one", "response": None},
    ]
    task = load(rows, max_length=5)
    assert len(task.train) == len(task.validation) == 1
    assert task.source.endswith(
        ", 6 rows without prompt or response left out, 2 responses longer than 5 tokens left out"
    )
    assert load(rows[:1]).source.endswith(load(rows[:1]).source[-12:]) and "left out" not in load(rows[:1]).source


def test_limits_count_rows_that_the_seed_draws_for_training_only(load):
    rows = [{"prompt": word, "response": "one"} for word in WORDS.split()]
    a, b, c = (load(rows, seed=seed, max_train_samples=5, max_eval_samples=4) for seed in (0, 0, 1))
    assert a.train == b.train != c.train and a.validation == c.validation
    assert (len(a.train), len(a.validation)) == (5, 4)


@pytest.mark.parametrize(
    "rows, message",
    (
        ([{"text": "x"}] * 2, r"has the columns text; sft reads prompt \+ response or .* \+ answer: rename two"),
        ([{"prompt": "one", "response": "two six"}] * 3, "of 3 rows, 0 lack .* 3 do not fit into 2 .*--max-length"),
        ([{"prompt": "one", "response": ""}] * 3, "of 3 rows, 3 lack prompt or response and 0 do not fit"),
        ([{"prompt": 1, "response": "two"}] * 3, "column 'prompt' holds 1, not text, at row 0"),
    ),
)  # fmt: skip
def test_rows_that_are_no_pairs_are_refused(load, rows, message):
    with pytest.raises(TaskError, match=f"train.json.* {message}"):
        load(rows, max_length=2)


# ------------------------------------------------------------------------------------------------------- the real data


def test_alpaca_rows_decode_to_their_outputs(data, stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    task = load_task("sft", tokenizer, data=data / "lm/alpaca", max_length=256, max_train_samples=200)
    text, response = read(tokenizer, next(e for e in task.train if len(e["input_ids"]) < 256))
    assert text.startswith("<s>") and response.endswith("</s>") and text.endswith("\n\n " + response)
    texts = [read(tokenizer, example) for example in task.train]
    assert not [text for text, response in texts if text.removesuffix(response).endswith("\n\n\n\n ")]
    assert len(task.train) + len(task.validation) < 200 + 250
    assert "train_5k.parquet without its last twentieth" in task.source and "left out" in task.source


def test_gsm8k_is_measured_on_its_test_split_and_says_so(data, stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    limits = {"max_train_samples": 20, "max_eval_samples": 20}
    task = load_task("sft", tokenizer, data=data / "lm/gsm8k", max_length=512, **limits)
    assert "validation on test.parquet (there is no validation file)" in task.source
    assert all("\n#### " in learnt(tokenizer, example) for example in task.train + task.validation)
