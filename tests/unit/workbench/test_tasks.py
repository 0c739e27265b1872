"""Tasks by name, and what all of them do: batches, evaluation, refusals."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from increlora.errors import TaskError
from increlora.workbench.tasks import TASKS, TaskOptions, find_task, load_model, load_task, resolve_backbone
from increlora.workbench.tasks.stdlib_docs import load_pairs


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_backbone())


@pytest.fixture(scope="module")
def task(tokenizer):
    return load_task("stdlib-docs", tokenizer, max_length=32, max_train_samples=100, max_eval_samples=41)


def test_limits_are_met_and_keep_the_balance(task):
    assert (len(task.train), len(task.validation)) == (100, 41)
    assert sum(e["labels"] for e in task.train) == 50 and sum(e["labels"] for e in task.validation) in (20, 21)
    lengths = [len(e["input_ids"]) for e in task.train]
    assert max(lengths) == 32 and min(lengths) < 32


def test_signature_and_summary_are_two_segments(task, tokenizer):
    first, text = load_pairs(seed=0)[0][0], tokenizer.decode(task.train[0]["input_ids"])
    assert text.count("[SEP]") == 2 and first.summary.lower()[:10] in text
    assert set(task.train[0]["token_type_ids"]) == {0, 1}


def test_batches_hold_every_example_once_and_follow_seed_and_epoch(task):
    def order(**clock):
        return [row for batch in task.batches(8, **clock) for row in batch["input_ids"].tolist()]

    def content(rows):
        return sorted(tuple(t for t in row if t) for row in rows)

    assert content(order(seed=0)) == sorted(tuple(e["input_ids"]) for e in task.train)
    assert order(seed=0, epoch=1) == order(seed=0, epoch=1)
    assert order(seed=0) != order(seed=0, epoch=1) != order(seed=1, epoch=1)


def test_batches_are_padded_to_their_own_longest_and_bucketing_saves_padding(task):
    widths = [batch["input_ids"].shape[1] for batch in task.batches(8, seed=0)]
    longest = [int(batch["attention_mask"].sum(1).max()) for batch in task.batches(8, seed=0)]
    assert widths == longest
    in_order = [task.collate(task.train[i : i + 8])["input_ids"].shape[1] for i in range(0, 100, 8)]
    assert sum(widths) < sum(in_order)


class AlwaysTrue(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids, **_):
        assert not self.training and not torch.is_grad_enabled()
        return SimpleNamespace(logits=torch.tensor([[0.0, 1.0]]).expand(len(input_ids), 2))


def test_accuracy_is_the_share_of_right_answers_and_the_mode_is_restored(task):
    model = AlwaysTrue().train()
    assert task.evaluate(model, batch_size=7) == {"accuracy": sum(e["labels"] for e in task.validation) / 41}
    assert model.training
    assert task.evaluate(model.eval()) == task.evaluate(model) and not model.training


def test_neither_batches_nor_evaluation_touch_the_training_random_state(task):
    before = torch.get_rng_state()
    list(task.batches(8, seed=0))
    task.evaluate(AlwaysTrue())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_task_names_the_nearest(tokenizer):
    with pytest.raises(TaskError, match="'stdlib_doc' is not known; did you mean 'stdlib-docs'"):
        load_task("stdlib_doc", tokenizer)


@pytest.mark.parametrize("limit", ({"max_train_samples": 1}, {"max_eval_samples": 0}))
def test_a_limit_below_two_is_refused(tokenizer, limit):
    with pytest.raises(TaskError, match=next(iter(limit))):
        load_task("stdlib-docs", tokenizer, **limit)


def test_data_that_a_task_cannot_use_is_refused(tokenizer, tmp_path):
    with pytest.raises(TaskError, match="nowhere does not exist: name a folder or file"):
        load_task("lm", tokenizer, data=tmp_path / "nowhere")
    with pytest.raises(TaskError, match="stdlib-docs reads the running Python's own library; leave it out"):
        load_task("stdlib-docs", tokenizer, data=tmp_path)


@pytest.mark.parametrize("task", ("lm", "sft"))
def test_a_task_without_data_of_its_own_asks_for_a_file_and_a_model(task, tokenizer):
    with pytest.raises(TaskError, match="name a file or folder by --data"):
        load_task(task, tokenizer)
    with pytest.raises(TaskError, match="name one by --model"):
        load_model(task, None, 0)


def test_a_path_may_be_a_string():
    assert TaskOptions(data="~").data == Path.home()


def test_the_kind_of_a_task_tells_the_model_it_needs():
    kinds = {name: (find_task(name).task_type, find_task(name).num_labels) for name in TASKS if name != "planted"}
    assert kinds["glue/stsb"] == ("SEQ_CLS", 1) and kinds["glue/mnli"] == ("SEQ_CLS", 3)
    assert kinds["glue/rte"] == kinds["stdlib-docs"] == ("SEQ_CLS", 2)
    assert kinds["lm"][0] == kinds["sft"][0] == "CAUSAL_LM"
