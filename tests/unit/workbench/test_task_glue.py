"""GLUE: official sizes, metrics by hand, and one clear sentence for foreign data."""

import math
import sys
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from increlora.errors import TaskError
from increlora.workbench.tasks import TASKS, load_classifier, load_task
from increlora.workbench.tasks.backbone import DEFAULT_BACKBONE
from increlora.workbench.tasks.glue import GLUE

NO_CORRELATION = {"pearson": 0, "spearmanr": 0}
WORDS = "a b c d 0 1 2 3 4 5 nan"


@pytest.fixture
def tokenizer(word_tokenizer):
    return word_tokenizer(WORDS)


def columns(name, answers, labels):
    """Rows of a task whose last word is the answer that `Obedient` gives."""
    texts = [f"{'abcd'[i % 4]} {answer}" for i, answer in enumerate(answers)]
    first = {column: ["a"] * len(texts) for column in GLUE[name].columns[:-1]}
    return first | {GLUE[name].columns[-1]: texts, "label": labels}


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in files.items():
        parquet.write_table(pa.table(table), folder / f"{name}.parquet")
    return folder


def small(folder, name, answers, labels, **more):
    """A folder of `name`: `labels` to train on, and the same rows to measure."""
    rows = columns(name, answers, labels)
    return write(folder / name, **{"train": rows, "validation": rows, **more})


class Obedient(torch.nn.Module):
    """Answers with the number that is the last word of its input."""

    def __init__(self, name, tokenizer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.num_labels, self.tokenizer = TASKS[f"glue/{name}"].num_labels, tokenizer

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        answers = torch.tensor([float(word) for word in self.tokenizer.convert_ids_to_tokens(input_ids[:, -1])])
        if self.num_labels == 1:
            return SimpleNamespace(logits=answers[:, None])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(answers.long(), self.num_labels).float())


@pytest.mark.parametrize(
    "name, answers, labels, expected, baseline",
    (
        ("rte", (0, 0, 1, 1), (0, 1, 1, 1), {"accuracy": 3 / 4}, {"accuracy": 3 / 4}),
        ("mrpc", (0, 0, 1, 1), (0, 1, 1, 1), {"accuracy": 3 / 4, "f1": 4 / 5}, {"accuracy": 3 / 4, "f1": 6 / 7}),
        ("qqp", (0, 0, 1, 0), (0, 0, 1, 1), {"accuracy": 3 / 4, "f1": 2 / 3}, {"accuracy": 1 / 2, "f1": 2 / 3}),
        ("mrpc", (0, 0, 0, 0), (0, 0, 0, 0), {"accuracy": 1, "f1": 0}, {"accuracy": 1, "f1": 0}),
        ("cola", (1, 1, 0, 0), (1, 1, 1, 0), {"matthews_correlation": 2 / 12**0.5}, {"matthews_correlation": 0}),
        ("cola", (1, 1, 1, 1), (1, 1, 1, 1), {"matthews_correlation": 0}, {"matthews_correlation": 0}),
        ("stsb", (0, 2, 1, 4), (0.0, 1, 2, 5), {"pearson": 10 / 122.5**0.5, "spearmanr": 0.8}, NO_CORRELATION),
        ("stsb", (3, 3, 3, 3), (0.0, 1, 2, 5), NO_CORRELATION, NO_CORRELATION),
        ("stsb", (1,), (5.0,), NO_CORRELATION, NO_CORRELATION),
        ("mnli", (0, 1, 2, 0), (0, 1, 2, 2), {"accuracy": 3 / 4}, {"accuracy": 1 / 2}),
    ),
)  # fmt: skip
def test_metrics_and_the_best_constant_answer_by_hand(tmp_path, tokenizer, name, answers, labels, expected, baseline):
    task = load_task(f"glue/{name}", tokenizer, data=small(tmp_path, name, answers, labels))
    assert task.evaluate(Obedient(name, tokenizer), batch_size=3) == pytest.approx(expected)
    assert task.baseline == pytest.approx(baseline)
    assert task.metric == next(iter(expected)) and task.higher_is_better


def test_a_model_that_has_diverged_gets_no_number(tmp_path, tokenizer):
    task = load_task("glue/stsb", tokenizer, data=small(tmp_path, "stsb", ("nan", 1, 2), (0, 1, 2)))
    assert all(map(math.isnan, task.evaluate(Obedient("stsb", tokenizer)).values()))


def test_mnli_is_judged_on_matched_and_reports_mismatched_beside(tmp_path, tokenizer):
    folder = write(
        tmp_path,
        train=columns("mnli", (0, 1), (0, 1)),
        validation_matched=columns("mnli", (0, 1, 2, 0), (0, 1, 2, 2)),
        validation_mismatched=columns("mnli", (0, 1, 2), (1, 2, 2)),
    )
    task = load_task("glue/mnli", tokenizer, data=folder)
    model = Obedient("mnli", tokenizer)
    assert task.evaluate(model, batch_size=2) == pytest.approx({"accuracy": 3 / 4, "accuracy_mismatched": 1 / 3})
    assert task.baseline == {"accuracy": 1 / 2}
    assert "validation_mismatched.parquet" in task.source
    limited = load_task("glue/mnli", tokenizer, data=folder, max_eval_samples=2)
    assert [example["mismatched"] for example in limited.validation] == [0, 0, 1, 1]


def test_labels_of_a_regression_train_by_squared_error(tmp_path):
    model, tokenizer = load_classifier(DEFAULT_BACKBONE, 1, 0)
    for labels in ((5.0, 0.0, 2.5), (5, 0, 2)):
        task = load_task("glue/stsb", tokenizer, data=small(tmp_path, "stsb", (1, 2, 3), labels))
        outputs = model(**task.collate(task.train))
        expected = (outputs.logits[:, 0] - torch.tensor(labels)).square().mean()
        torch.testing.assert_close(outputs.loss, expected)
        outputs.loss.backward()


def test_training_rows_are_drawn_by_the_seed_and_validation_rows_are_not(tmp_path, tokenizer):
    labels = [i % 2 for i in range(60)]
    folder = small(tmp_path, "rte", [i % 6 for i in range(60)], labels)
    options = {"data": folder, "max_train_samples": 20, "max_eval_samples": 10}
    a, b, c = (load_task("glue/rte", tokenizer, seed=seed, **options) for seed in (0, 0, 1))
    assert a.train == b.train != c.train and len(a.train) == 20
    assert a.validation == c.validation and len(a.validation) == 10


# ------------------------------------------------------------------------------------------------------- the real data


@pytest.mark.parametrize("name", ("rte", "mrpc", "cola", "stsb", "wnli"))
def test_the_official_files_are_whole(data, word_tokenizer, name):
    task = load_task(f"glue/{name}", word_tokenizer("a"), data=data / "glue")
    assert (len(task.train), len(task.validation)) == (GLUE[name].train_size, GLUE[name].validation_size)
    majority = {"rte": 146 / 277, "mrpc": 279 / 408, "wnli": 40 / 71}
    assert task.baseline[task.metric] == pytest.approx(majority.get(name, 0))
    if name == "mrpc":
        assert task.baseline["f1"] == pytest.approx(2 * 279 / (408 + 279))


def test_the_tasks_folder_itself_will_do(data, tokenizer):
    wnli = [load_task("glue/wnli", tokenizer, data=folder) for folder in (data / "glue", str(data / "glue/wnli"))]
    assert wnli[0].source == wnli[1].source and wnli[0].validation == wnli[1].validation


# ------------------------------------------------------------------------------------------------------------- the hub


def test_the_hub_is_asked_where_no_folder_is_named(monkeypatch, tokenizer):
    def load_dataset(path, name):
        assert (path, name) == ("nyu-mll/glue", "mnli")
        splits = {"train": [0, 1, 2], "validation_matched": [0, 1], "validation_mismatched": [2], "test_matched": [-1]}
        return {
            split: datasets.Dataset.from_dict(columns(name, [0] * len(labels), labels))
            for split, labels in splits.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("glue/mnli", tokenizer)
    assert [len(task.train), len(task.validation)] == [3, 3] and "hub" in task.source
    numbers = task.evaluate(Obedient("mnli", tokenizer))
    assert numbers == pytest.approx({"accuracy": 1 / 2, "accuracy_mismatched": 0})


def test_without_a_hub_the_remedy_is_named(monkeypatch, tokenizer):
    def unreachable(*_):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        TaskError, match=r"\(ConnectionError: no network\); name the folder .*rte/train.parquet.* --data"
    ):
        load_task("glue/rte", tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="ModuleNotFoundError.* --data"):
        load_task("glue/rte", tokenizer)


# ----------------------------------------------------------------------------------------------------------- bad input

GOOD = {"sentence1": ["a", "b", "c"], "sentence2": ["a", "b", "c"], "label": [0, 1, 1]}


@pytest.mark.parametrize(
    "bad, message",
    (
        (
            {"sentence1": None},
            "has the columns sentence2, label but glue/rte reads sentence1, sentence2, label; rename",
        ),
        ({"label": None}, "has the columns sentence1, sentence2 but glue/rte reads"),
        (
            {"label": [0, 1, 2]},
            "label 2 at row 2 but glue/rte has 0 entailment, 1 not_entailment; remove or correct it",
        ),
        ({"label": [-1, -1, -1]}, "label -1 at row 0 .*a test set's labels are hidden: name another file"),
        ({"label": ["0", "1", "1"]}, "label '0' at row 0 but glue/rte has 0 entailment, 1 not_entailment; remove"),
        ({"label": [0.0, 1.0, 1.0]}, "label 0.0 at row 0 but glue/rte has 0 entailment, 1 not_entailment; remove"),
        ({"label": [False, True, True]}, "label False at row 0 but glue/rte has 0 entailment, 1 not_entail"),
        ({"label": [0, None, 1]}, "label None at row 1 but glue/rte has 0 entailment, 1 not_entailment; remove"),
        ({"sentence2": ["a", "b", None]}, "column 'sentence2' is null at row 2"),
        ({"sentence2": [1, 2, 3]}, "column 'sentence2' holds 1, not text, at row 0"),
        ({"sentence1": [], "sentence2": [], "label": []}, "has no rows"),
    ),
)
@pytest.mark.parametrize("split", ("train", "validation"))
def test_foreign_rows_are_refused_by_file_and_row(tmp_path, tokenizer, split, bad, message):
    rows = {name: values for name, values in {**GOOD, **bad}.items() if values is not None}
    folder = write(tmp_path / "rte", **{"train": GOOD, "validation": GOOD, split: rows})
    with pytest.raises(TaskError, match=message) as caught:
        load_task("glue/rte", tokenizer, data=tmp_path, max_train_samples=2, max_eval_samples=2)
    assert str(caught.value).startswith(str(folder / f"{split}.parquet"))


@pytest.mark.parametrize("label", (5.1, -0.1, float("nan")))
def test_a_score_out_of_range_is_refused(tmp_path, tokenizer, label):
    folder = small(tmp_path, "stsb", (0, 1), (1.0, label))
    with pytest.raises(TaskError, match=f"label {label} at row 1 but glue/stsb has 0 to 5"):
        load_task("glue/stsb", tokenizer, data=folder)


def test_missing_files_are_named(tmp_path, tokenizer):
    with pytest.raises(
        TaskError, match="rte has no validation file beside train.parquet; glue/rte reads train.parquet"
    ):
        load_task("glue/rte", tokenizer, data=write(tmp_path / "a" / "rte", train=GOOD).parent)
    with pytest.raises(TaskError, match="b has no training file but validation.parquet"):
        load_task("glue/rte", tokenizer, data=write(tmp_path / "b", validation=GOOD))
    with pytest.raises(TaskError, match="train.parquet is a file but glue/rte reads .* name that folder"):
        load_task("glue/rte", tokenizer, data=tmp_path / "a" / "rte" / "train.parquet")
    with pytest.raises(TaskError, match="nowhere does not exist"):
        load_task("glue/rte", tokenizer, data=tmp_path / "nowhere")
