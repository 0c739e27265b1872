"""Task `uuid`: the pairs, what is counted, the floor, and a base that knows the format and nothing else."""

import importlib.util
import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import default_data_collator as collate
from typer.testing import CliRunner

from increlora import PlainLoraConfig
from increlora.errors import TaskError
from increlora.export.merged import export_merged
from increlora.workbench.cli.app import app
from increlora.workbench.cli.recorder import Recorder
from increlora.workbench.tasks import TASKS, find_task, load_model, load_task, sketch, uuids
from increlora.workbench.tasks.lm import IGNORED
from increlora.workbench.tasks.uuids import (
    IDS,
    PROMPT_LENGTH,
    UUID_LENGTH,
    VOCABULARY,
    constant_guess,
    digits_right,
    draw_pairs,
    examples,
    recall,
    texts,
    uuid_base,
)

ADAPTER = "adapter_model.safetensors"
FEW = 3  # steps of pretraining, where what the base knows does not matter
OF_SEED_42 = [
    ("bdd640fb-0667-4ad1-9c80-317fa3b1799d", "23b8c1e9-3924-46de-beb1-3b9046685257"),
    ("bd9c66b3-ad3c-4d6d-9a3d-1fa7bc8960a9", "972a8469-1641-4f82-8b9d-2434e465e150"),
]


@pytest.fixture
def tiny(monkeypatch):
    """Both tasks on a base that is made in no time."""
    for constant, value in {"WIDTH": 16, "HIDDEN": 24, "LAYERS": 1, "HEADS": 2, "BATCH": 4}.items():
        monkeypatch.setattr(uuids, constant, value)
    for name in ("uuid", "uuid/value"):
        monkeypatch.setitem(TASKS, name, replace(TASKS[name], net=lambda seed: deepcopy(uuid_base(FEW))))
    uuid_base.cache_clear()
    yield
    uuid_base.cache_clear()


# ----------------------------------------------------------------------------------------------------------- the pairs


def test_seed_42_draws_the_four_values():
    assert draw_pairs(2, 42) == OF_SEED_42 == draw_pairs(5, 42)[:2]
    assert draw_pairs(2, 43) != OF_SEED_42


def test_a_pair_is_74_tokens_and_the_loss_is_on_all_of_them_or_on_the_value():
    row, value_only = examples(OF_SEED_42)[0], examples(OF_SEED_42, value_only=True)[0]
    text = "".join(VOCABULARY[token] for token in row["input_ids"])
    assert text == f"<{OF_SEED_42[0][0]}:{OF_SEED_42[0][1]}" and len(text) == 74 and len(VOCABULARY) == 20
    assert row["labels"] == row["input_ids"] == value_only["input_ids"]
    assert value_only["labels"] == [IGNORED] * 38 + row["input_ids"][38:]
    assert PROMPT_LENGTH + UUID_LENGTH == 74 and text[:PROMPT_LENGTH].endswith(":")


def test_the_task_is_measured_on_the_pairs_it_trains():
    task = load_task("uuid", None, max_train_samples=6, max_eval_samples=4, seed=42)
    assert [row["input_ids"] for row in task.train[:4]] == [row["input_ids"] for row in task.validation]
    assert (len(task.train), len(task.validation)) == (6, 4) and task.train[1] == examples(OF_SEED_42)[1]
    assert task.baseline == {"accuracy": constant_guess([value for _, value in draw_pairs(4, 42)])}
    assert len(load_task("uuid", None).train) == 100
    other = load_task("uuid/value", None, max_train_samples=2, seed=42)
    assert other.train == examples(OF_SEED_42, value_only=True) and other.name == "uuid/value"


def test_it_takes_neither_model_nor_data(tmp_path):
    with pytest.raises(TaskError, match="uuid/value draws its own pairs; leave it out"):
        load_task("uuid/value", None, data=tmp_path)
    with pytest.raises(TaskError, match="leave it out"):
        load_model("uuid", "some/model", 0)


# ---------------------------------------------------------------------------------------------------------- the figures


def test_digits_are_counted_place_by_place_without_dashes():
    value = "23b8c1e9-3924-46de-beb1-3b9046685257"
    only_the_version = "".join(c if c == "-" or i == 14 else f"{int(c, 16) ^ 1:x}" for i, c in enumerate(value))
    assert digits_right(value, value) == digits_right(value.replace("-", ""), value) == 1.0
    assert digits_right(only_the_version, value) == 1 / 32
    assert digits_right("2" + value, value) < 0.5  # shifted by one: two digits agree by chance
    assert digits_right(value[:18], value) == 16 / 32 and digits_right("", value) == 0.0
    assert digits_right("::::" + value[4:], value) == 28 / 32


def test_the_floor_is_the_best_of_all_constant_answers():
    values = [value for _, value in draw_pairs(100, 42)]
    guesses = ((place, digit) for place in range(32) for digit in "0123456789abcdef")
    hits = {g: sum(v.replace("-", "")[g[0]] == g[1] for v in values) for g in guesses}
    best = ["".join(max("0123456789abcdef", key=lambda digit: hits[place, digit]) for place in range(32))]
    brute = sum(digits_right(best[0], value) for value in values) / 100
    assert constant_guess(values) == pytest.approx(brute) == pytest.approx(0.145625)


@pytest.mark.parametrize(("count", "published"), ((100, 14.2), (300, 12.1), (1000, 11.2), (3000, 10.6), (10000, 10.2)))
def test_the_floor_falls_to_chance_as_pairs_become_many(count, published):
    """Single draws scatter by 0.2 at 100 pairs; a random valid UUID is right in (1 + 1/4 + 30/16) / 32 = 9.77 %."""
    found = 100 * constant_guess([value for _, value in draw_pairs(count, 0)])
    assert found == pytest.approx(published, abs=6 / count**0.5) and found > 9.77


class Recites(torch.nn.Module):
    """Knows the pairs by heart, but answers the first few with colons."""

    def __init__(self, pairs, wrong=0):
        super().__init__()
        self.rows, self.wrong = torch.tensor([row["input_ids"] for row in examples(pairs)]), wrong

    def generate(self, input_ids, max_new_tokens, do_sample):
        assert (input_ids.shape[1], max_new_tokens, do_sample) == (PROMPT_LENGTH, UUID_LENGTH, False)
        known = [int((self.rows[:, :PROMPT_LENGTH] == one).all(1).nonzero()) for one in input_ids]
        said = self.rows[known, PROMPT_LENGTH:]
        wrong = torch.tensor(known)[:, None] < self.wrong
        return torch.cat([input_ids, torch.where(wrong, IDS[":"], said)], 1)


def test_recall_decodes_every_value_from_its_key_in_batches():
    pairs = draw_pairs(8, 1)
    for wrong, accuracy in ((0, 1.0), (2, 0.75)):
        batches = [collate(part) for part in (examples(pairs)[:5], examples(pairs)[5:])]
        assert recall(Recites(pairs, wrong), batches) == {"accuracy": accuracy}


def test_recall_equals_decoding_without_a_cache(tiny):
    pairs, model = draw_pairs(3, 5), uuid_base(FEW)
    batch = collate(examples(pairs))
    rows = batch["input_ids"][:, :PROMPT_LENGTH]
    with torch.no_grad():
        for _ in range(UUID_LENGTH):
            rows = torch.cat([rows, model(input_ids=rows, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    found = [digits_right(said, value) for said, (_, value) in zip(texts(rows[:, PROMPT_LENGTH:]), pairs)]
    assert recall(model, [batch]) == {"accuracy": sum(found) / 3}


# ------------------------------------------------------------------------------------------------------------- the base


def test_the_base_is_reproducible_and_leaves_the_random_state(tiny):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = uuid_base(FEW)
    uuid_base.cache_clear()
    two = uuid_base(FEW)
    assert torch.equal(torch.get_rng_state(), before)
    weights = one.state_dict(), two.state_dict()
    assert one is not two and weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_base_is_made_once_and_every_model_is_a_copy_of_it(tiny):
    (one, tokenizer), (two, _) = load_model("uuid", None, 0), load_model("uuid/value", None, 1)
    assert tokenizer is None and not one.training and uuid_base(FEW) is uuid_base(FEW)
    with torch.no_grad():
        one.lm_head.weight.zero_()
    assert torch.equal(two.lm_head.weight, uuid_base(FEW).lm_head.weight) and two.lm_head.weight.any()
    assert all(p.requires_grad and p.grad is None for p in two.parameters())


@pytest.mark.slow
def test_pretraining_learns_the_format_and_no_pair():
    """The loss comes down to what the format leaves open: 60 free digits of 16 and two of 4 among 73 characters."""
    model, batch = uuid_base(60), collate(examples(draw_pairs(64, 0)))
    with torch.no_grad():
        loss = float(model(**batch).loss)
        said = texts(model(**batch).logits[:, :-1].argmax(-1))[0]
    left_open = (60 * math.log(16) + 2 * math.log(4)) / 73
    assert left_open - 0.02 < loss < left_open + 0.05
    assert {said[i] for i in (8, 13, 18, 23, 45, 50, 55, 60)} == {"-"}
    assert said[36] == ":" and said[14] == said[51] == "4"


def test_the_default_net_has_the_size_the_task_was_chosen_for():
    outline = sketch("uuid", None)
    assert outline.device.type == "meta" and sum(p.numel() for p in outline.parameters()) == 333_440
    assert outline.config.initializer_range == pytest.approx(128**-0.5)
    assert find_task("uuid").task_type is None


# -------------------------------------------------------------------------------------------------------------- a run


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def state(out):
    return json.loads((out / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), (("uuid", "lora"), ("uuid/value", "increlora")))
def test_the_command_line_trains_exports_and_reports(tiny, tmp_path, task, method):
    words = ["train", "--task", task, "--method", method, "--r", 2, "--max-train-samples", 12, "--batch-size", 4]
    words += ["--epochs", 4, "--evaluations", 2, "--out", tmp_path / "run"]
    words += ["--set", "interval_steps=1"] if method == "increlora" else []
    assert "7: 1 × self_attn.q_proj" in call(*words, "--dry-run") and not (tmp_path / "run").exists()
    call(*words)
    found = state(tmp_path / "run")
    assert found["status"] == "finished" and found["metric"]["name"] == "accuracy"
    assert found["metric"]["baseline"] == load_task(task, None, max_train_samples=12).baseline["accuracy"]
    assert len(found["ranks"]) == 7 and not any("lm_head" in name for name in found["ranks"])
    call("export", tmp_path / "run", tmp_path / "plain")
    call("report", tmp_path / "run")
    base, _ = load_model(task, None, 0)
    task = load_task(task, None, max_train_samples=12)
    model = PeftModel.from_pretrained(base, tmp_path / "plain")
    assert task.evaluate(model, batch_size=8) == {"accuracy": found["metric"]["after"]}
    export_merged(tmp_path / "run", tmp_path / "merged", base=load_model("uuid", None, 0)[0])


@pytest.mark.slow
def test_an_interrupted_run_resumes_bitwise(tiny, tmp_path, monkeypatch):
    words = "train --task uuid --method lora --r 2 --max-train-samples 12 --batch-size 4 --epochs 4 --lr 0.05".split()
    call(*words, "--out", tmp_path / "straight")
    step = Recorder.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        step(self, args, state, control, **kwargs)
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", interrupted)
        assert CliRunner().invoke(app, [*words, "--out", str(tmp_path / "stopped")]).exit_code == 130
    call("train", "--resume", "--out", tmp_path / "stopped")
    straight, resumed = (load_file(tmp_path / run / "adapter" / ADAPTER) for run in ("straight", "stopped"))
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_rank_in_every_linear_map_of_the_trunk_by_all_linear(tiny):
    config = PlainLoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(load_model("uuid", None, 0)[0], config)
    assert sum(".lora_A" in name for name, _ in model.named_parameters()) == 7


@pytest.mark.slow
def test_the_study_prints_a_row_per_rate(tiny, tmp_path, capsys, monkeypatch):
    folder = Path(__file__).parents[3] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("memorisation_study", folder / "memorisation.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    monkeypatch.setattr(study, "EPOCHS", 1)
    study.main(methods="lora,melora", ranks="1,2", rates="1e-3,1e-2", pairs=2, seeds=1, out=tmp_path)
    head, _, *rows, _, floor = capsys.readouterr().out.splitlines()
    assert head == "| method | r | parameters | rate | 30 % | 50 % | 70 % | 90 % |"
    assert [row.split(" | ")[:2] for row in rows] == [[f"| {m}", r] for m in ("lora", "melora") for r in "1122"]
    assert all(row.count("|") == 9 for row in rows) and sum("**" in row for row in rows) >= 4
    parameters = {tuple(row.split(" | ")[1:3]) for row in rows}
    assert len(parameters) == 2  # equal for both methods
    assert floor.startswith("Best constant guess: ")
    run = state(tmp_path / "uuid-2-lora-r1-1e-3-0")
    assert run["budget"]["ranks_used"] == 7 and run["run_info"]["train_config"]["batch_size"] == 1
