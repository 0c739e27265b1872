"""The command line, on a tiny model: what a run leaves behind, that it resumes bitwise, and one sentence per error."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import increlora.workbench.cli
from increlora import IncreLoraConfig
from increlora.errors import NonFiniteError
from increlora.naming import parts, short
from increlora.workbench.cli.app import app
from increlora.workbench.cli.build import set_head_dropout, target_modules
from increlora.workbench.cli.display import rank_map
from increlora.workbench.cli.recorder import Recorder
from increlora.workbench.tasks import DEFAULT_BACKBONE, load_classifier
from tests.hosts.bases import write_character_bert
from tests.hosts.comparison_schema import UNKNOWN_TO_A_RUN, problems

pytestmark = pytest.mark.slow  # most of it trains

TINY = "--r 2 --epochs 2.5 --batch-size 8 --max-length 16 --max-train-samples 64 --max-eval-samples 20".split()
ADVANCE = (  # the default but for a reserve: with one, peak and average differ from the end
    "--preset paper --set reserve=trained --set newborn=published --set selection=exact --set finish=retire "
    "--set score_window=8 --set score_accumulation=mean --set scaling=constant --set start=lora --set clock=ramp "
    "--set lora_alpha=8 --set warmup_steps=0.05 --set interval_steps=0.03 --set birth_warmup=0.03 --set top_h=none "
    "--set orthogonality=0"
).split()
STEPS = 20  # of the run that TINY describes: 8 per epoch, a checkpoint and an evaluation after every 5
MODULES = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A two-layer BERT with one token per character."""
    folder = tmp_path_factory.mktemp("bert")
    write_character_bert(folder)
    return folder


def call(*words):
    """The app's answer; an error that is not one sentence is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train(model, out, *words):
    return call("train", "--model", model, "--out", out, *TINY, *words)


def refused(*words):
    """The one sentence with which the app refuses."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"error: .+\n", result.stderr)
    return result.stderr


def state(out):
    return json.loads((out / "run.json").read_text())


def rows(out, name):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A finished run, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    result = train(model, out, *ADVANCE)
    assert result.exit_code == 0, result.output
    return out, result.output


# ------------------------------------------------------------------------------------------------------- what a run is


def test_a_finished_run_says_what_it_was_and_what_came_out(run, model):
    out, _ = run
    found = state(out)
    assert (found["status"], found["method"], found["task"], found["seed"]) == (
        "finished",
        "increlora",
        "stdlib-docs",
        0,
    )
    metric, budget = found["metric"], found["budget"]
    assert metric["name"] == "accuracy" and 0 <= metric["before"] <= 1
    assert metric["best"] >= metric["after"] >= 0
    assert budget["ranks_target"] == budget["ranks_used"] == 2 * MODULES == sum(found["ranks"].values())
    assert budget["parameters_target"] == 2 * 2 * (4 * 32 + 2 * 40)
    assert budget["parameters_used"] <= budget["parameters_target"]
    assert len(found["ranks"]) == MODULES and "encoder.layer.1.attention.self.query" in str(found["ranks"])
    assert not [name for name in found["ranks"] if "pooler" in name or "classifier" in name]
    assert 0 < found["seconds"]["train"] < found["seconds"]["total"]
    assert found["peak_memory_bytes"] > 50e6
    assert {"python", "torch", "peft", "transformers", "increlora", "cpu_count", "platform"} <= set(
        found["environment"]
    )
    assert found["train_info"]["status"] == "success" and found["run_info"]["peft_config"]["r"] == 2
    assert found["adaptive"] is True
    assert found["train_info"]["file_size"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size


def test_a_run_has_every_key_of_a_result_of_method_comparison(run):
    """Null where a run does not know: no accelerator here, no commit, no test split."""
    out, _ = run
    found = state(out)
    assert problems(found, nullable=UNKNOWN_TO_A_RUN) == []
    assert found["run_info"]["train_config"]["model_id"] and found["meta_info"]["package_info"]["peft-version"]
    last = found["train_info"]["metrics"][-1]
    assert last["step"] == STEPS and last["valid accuracy"] == found["metric"]["after"] and last["train loss"] > 0


def test_there_is_a_row_per_step_and_per_event(run):
    out, _ = run
    metrics, events, found = rows(out, "metrics.jsonl"), rows(out, "events.jsonl"), state(out)
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    assert [row["step"] for row in metrics if "accuracy" in row] == [0, 5, 10, 15, 20]
    assert metrics[0]["accuracy"] == found["metric"]["before"] and metrics[-1]["accuracy"] == found["metric"]["after"]
    assert max(row["accuracy"] for row in metrics[1:] if "accuracy" in row) == found["metric"]["best"]
    births = [event for event in events if event["kind"] == "birth"]
    assert MODULES + sum(event["ranks"] for event in births) == 2 * MODULES
    for row in metrics[1:]:
        assert row["ranks"] == MODULES + sum(e["ranks"] for e in births if e["step"] < row["step"])
        assert row["loss"] > 0 and row["learning_rate"] >= 0
    final = {event["module"]: event["rank"] for event in events}
    assert final == found["ranks"]


def test_peak_and_average_count_what_is_live_in_each_step(run):
    out, _ = run
    live = [row["parameters"] for row in rows(out, "metrics.jsonl")[1:]]
    budget = state(out)["budget"]
    uniform = 2 * (4 * 32 + 2 * 40)
    assert live[0] == uniform and live[1] == 2 * uniform  # rank 1 everywhere, then a reserve behind it
    assert live[-1] == budget["parameters_used"]  # the reserve retired
    assert budget["parameters_peak"] == max(live) > budget["parameters_used"]
    assert budget["parameters_average"] == pytest.approx(sum(live) / STEPS)


def test_the_adapter_and_its_export_load_and_agree(run, model):
    out, _ = run
    native, plain = (
        PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(model), out / name).eval()
        for name in ("adapter", "lora")
    )
    assert PeftConfig.from_pretrained(out / "lora").peft_type == "LORA"
    ids = torch.arange(4, 20).reshape(2, 8)
    with torch.no_grad():
        first, second = native(ids).logits, plain(ids).logits
    assert torch.allclose(first, second, atol=1e-6)
    fresh = load_classifier(str(model), 2, 0)[0].classifier.weight
    assert not torch.equal(fresh, native.base_model.model.classifier.modules_to_save["default"].weight)


def test_the_first_line_of_the_config_is_the_command_that_makes_the_run(run, model):
    out, _ = run
    first, _, rest = (out / "config.toml").read_text().partition("\n")
    assert first == f"# {state(out)['command']}"
    words = shlex.split(first.removeprefix("# increlora train"))
    pairs = list(zip(words[::2], words[1::2]))
    switches = vars(IncreLoraConfig.paper().settings())
    changed = [v for v in ADVANCE[3::2] if v.partition("=")[2] != str(switches[v.partition("=")[0]])]
    assert sorted(v for k, v in pairs if k == "--set") == sorted(changed) and ("--preset", "paper") in pairs
    given = {k.removeprefix("--").replace("-", "_"): v for k, v in pairs if k != "--set"}
    assert given.pop("out") == str(out) and given["epochs"] == "2.5" and "lr" not in given
    table = tomllib.loads(rest)
    assert {name: str(table[name]) for name in given} == given
    assert table["lr"] == 1e-3 and table["options"]["interval_steps"] == 0.03


def test_the_terminal_shows_budget_metric_and_rank_map(run):
    out, printed = run
    found = state(out)
    assert f"step 20/{STEPS}  loss " in printed and "ranks 24/24" in printed
    assert len(re.findall(r"^step ", printed, re.M)) == 10
    assert f"{found['metric']['before']:.3f} → {found['metric']['after']:.3f}" in printed
    assert f"{found['budget']['parameters_peak']:,} at peak" in printed
    assert str(out) in printed.replace("\n", "")
    for layer in "01":
        ranks = [r for name, r in found["ranks"].items() if f".layer.{layer}." in name]
        numbers = next(re.findall(r"\d+", line) for line in printed.splitlines() if re.match(rf"│\s+{layer} │", line))
        assert [int(n) for n in numbers] == [int(layer), *ranks]


def test_lora_has_its_rank_everywhere_from_the_start(model, tmp_path):
    assert train(model, tmp_path / "x", "--method", "lora", "--epochs", "0.25").exit_code == 0
    found = state(tmp_path / "x")
    budget = found["budget"]
    assert set(found["ranks"].values()) == {2}
    assert budget["parameters_peak"] == budget["parameters_average"] == budget["parameters_used"] == 832
    assert rows(tmp_path / "x", "metrics.jsonl")[-1]["step"] == 2 and not (tmp_path / "x" / "events.jsonl").exists()
    assert state(tmp_path / "x")["adaptive"] is False


def test_melora_has_the_parameters_of_lora_and_is_exported_with_its_rank(model, tmp_path):
    out = tmp_path / "x"
    assert train(model, out, "--method", "melora", "--set", "minis=4", "--epochs", "0.25").exit_code == 0
    found = state(out)
    budget = found["budget"]
    assert set(found["ranks"].values()) == {2}
    assert budget["parameters_peak"] == budget["parameters_average"] == budget["parameters_used"] == 832
    exported = load_file(out / "lora" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in exported.items() if "lora_A" in name} == {8}
    assert "832 of 832" in call("inspect", out).output
    assert "rank 8 for all" in call("inspect", out / "lora").output
    assert call("report", out).exit_code == 0 and (out / "report.html").is_file()
    assert "minis=5 does not divide both in=16 and out=16; the nearest that does is 4" in refused(
        "train", "--model", model, "--out", tmp_path / "y", *TINY, "--method", "melora", "--set", "minis=5"
    )


def test_mora_has_at_most_the_parameters_of_lora_restarts_and_is_exported_with_its_rank(model, tmp_path):
    out = tmp_path / "x"
    options = ("--set", "restart_steps=0.5", "--set", "restart_warmup=1", "--set", "restart_maps=cycle")
    assert train(model, out, "--method", "mora", *options, "--epochs", "1").exit_code == 0
    found = state(out)
    sides = set(found["ranks"].values())
    assert found["budget"]["parameters_used"] == sum(side**2 for side in found["ranks"].values()) <= 832
    assert {row["kind"] for row in rows(out, "events.jsonl")} == {"restart"}
    exported = load_file(out / "lora" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in exported.items() if "lora_A" in name} == {2 * max(sides)}
    assert "of 832" in call("inspect", out).output
    assert call("report", out).exit_code == 0 and (out / "report.html").is_file()


def test_a_run_without_a_low_rank_says_how_it_leaves(model, tmp_path):
    out = tmp_path / "x"
    words = ("--method", "mora", "--set", "operator=rotation", "--set", "dead_inputs=fold", "--epochs", "0.25")
    result = train(model, out, *words)
    assert result.exit_code == 0 and (out / "adapter").is_dir() and not (out / "lora").exists()
    assert "no low rank" in result.output and "--merge" in result.output
    assert "lose over 1.0% of their" in refused("export", out, tmp_path / "lora")
    assert call("export", out, tmp_path / "lora", "--tolerance", "1").exit_code == 0


def test_lorta_takes_the_projections_of_attention_and_counts_what_they_share(model, tmp_path):
    out, count = tmp_path / "x", 2 * (16 + 8 + 2 + 2 + 4)
    words = ("--method", "lorta", "--set", "lora_alpha=16", "--epochs", "0.25")
    assert train(model, out, *words).exit_code == 0
    found = state(out)
    budget = found["budget"]
    assert len(found["ranks"]) == 8 and set(found["ranks"].values()) == {2}
    assert budget["parameters_peak"] == budget["parameters_average"] == budget["parameters_used"] == count
    exported = load_file(out / "lora" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in exported.items() if "lora_A" in name} == {2}
    assert f"{count} of {2 * 8 * 32}" in call("inspect", out).output
    assert call("report", out).exit_code == 0 and (out / "report.html").is_file()
    assert f"{count} throughout" in call("train", "--config", out / "config.toml", "--dry-run").output
    assert "matrices={'dense': 'q'}" in refused(
        "train", "--model", model, "--out", tmp_path / "y", *TINY, *words, "--target-modules", "query,dense"
    )
    assert "layers=3: give a list of words" in refused(
        "train", "--model", model, "--out", tmp_path / "y", *TINY, "--method", "lorta", "--set", "layers=3"
    )


# -------------------------------------------------------------------------------------------- interruption and resuming


def stop_at(monkeypatch, step, error):
    """Let training stop with an error at the end of a step."""
    goes_on = Recorder.on_step_end

    def stops(self, args, state, control, **kwargs):
        goes_on(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise error

    monkeypatch.setattr(Recorder, "on_step_end", stops)


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):
    """A run interrupted in step 13, with a checkpoint after step 10, in the middle of the second epoch."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 13, KeyboardInterrupt())
        result = train(model, out, *ADVANCE)
    assert result.exit_code == 130 and f"train --resume --out {out}" in result.stderr
    return out


@pytest.fixture
def interrupted(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "again")


def test_an_interrupted_run_says_so_and_keeps_what_it_has(stopped):
    found = state(stopped)
    assert found["status"] == "interrupted" and found["seconds"]["total"] > 0
    assert rows(stopped, "metrics.jsonl")[-1]["step"] == 12
    assert {p.name for p in (stopped / "checkpoints").iterdir()} == {"checkpoint-5", "checkpoint-10"}
    assert not (stopped / "adapter").exists()


def test_a_resumed_run_equals_the_straight_one_bitwise(run, interrupted, model):
    result = call("train", "--resume", "--out", interrupted)
    assert result.exit_code == 0, result.output
    straight, _ = run
    for folder in ("adapter", "lora"):
        first, second = (load_file(out / folder / "adapter_model.safetensors") for out in (straight, interrupted))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert rows(straight, "events.jsonl") == rows(interrupted, "events.jsonl")
    without_time = [[{**row, "seconds": 0} for row in rows(o, "metrics.jsonl")] for o in (straight, interrupted)]
    assert without_time[0] == without_time[1]
    found, again = state(straight), state(interrupted)
    assert again["status"] == "finished" and again["seconds"]["total"] > again["seconds"]["train"] > 0
    for key in ("metric", "budget", "ranks"):
        assert again[key] == found[key]


def test_a_run_killed_behind_its_last_step_takes_no_step_more(run, model, tmp_path):
    out = shutil.copytree(run[0], tmp_path / "killed")
    for folder in ("adapter", "lora"):
        shutil.rmtree(out / folder)
    (out / "run.json").write_text(json.dumps(state(out) | {"status": "running"}))
    result = call("train", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    for folder in ("adapter", "lora"):
        first, second = (load_file(path / folder / "adapter_model.safetensors") for path in (run[0], out))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert rows(out, "metrics.jsonl") == rows(run[0], "metrics.jsonl")
    assert all(state(out)[key] == state(run[0])[key] for key in ("status", "metric", "budget", "ranks"))


def test_a_run_without_a_checkpoint_starts_over(run, interrupted):
    shutil.rmtree(interrupted / "checkpoints")
    call("train", "--resume", "--out", interrupted)
    straight, _ = run
    first, second = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (straight, interrupted))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_lost(interrupted):
    folder = interrupted / "checkpoints" / "checkpoint-10"
    before = (interrupted / "metrics.jsonl").read_bytes()
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "rng_state.pth"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        message = refused("train", "--resume", "--out", interrupted)
        assert name in message and "to resume from the checkpoint before it" in message
        (folder / name).write_bytes(whole)
    (folder / "scheduler.pt").unlink()
    assert "scheduler.pt is missing" in refused("train", "--resume", "--out", interrupted)
    assert (interrupted / "metrics.jsonl").read_bytes() == before and state(interrupted)["status"] == "interrupted"


@pytest.mark.parametrize(
    ("words", "named"),
    (
        (["--lr", "0.01"], "runs with --lr 0.001, not 0.01"),
        (["--method", "lora"], "runs with --method increlora, not lora"),
        (["--set", "top_h=3"], "runs with --set top_h None, not 3"),
        (["--seed", "1", "--r", "2"], "runs with --seed 0, not 1"),
    ),
)
def test_a_resumed_run_keeps_its_settings(stopped, words, named):
    assert f"{stopped} {named}" in refused("train", "--resume", "--out", stopped, *words)


def test_a_finished_run_and_no_run_cannot_be_resumed(run, tmp_path):
    assert "nothing is left to resume" in refused("train", "--resume", "--out", run[0])
    assert "holds no run to resume" in refused("train", "--resume", "--out", tmp_path)
    assert "goes with neither --overwrite" in refused("train", "--resume", "--overwrite", "--out", tmp_path)


def test_what_is_saved_names_the_base_and_no_place_on_this_machine(tmp_path):
    out = tmp_path / "default"
    words = "--max-train-samples 16 --max-eval-samples 4 --batch-size 8 --max-length 16 --epochs 1 --method lora"
    assert call("train", "--out", out, *words.split()).exit_code == 0
    for folder in ("adapter", "lora"):
        found = json.loads((out / folder / "adapter_config.json").read_text())
        assert found["base_model_name_or_path"] == DEFAULT_BACKBONE
    assert "site-packages" not in (out / "adapter" / "README.md").read_text()


def test_a_diverged_run_ends_and_says_so(tmp_path):
    words = "train --task planted --r 2 --max-train-samples 128 --max-eval-samples 64 --batch-size 64 --epochs 4"
    result = call(*words.split(), "--lr", "1e30", "--method", "lora", "--out", tmp_path / "diverged")
    assert result.exit_code == 0, result.output
    assert "not finite" in result.output and state(tmp_path / "diverged")["metric"]["after"] is None
    assert "the run diverged" in result.output and not (tmp_path / "diverged" / "lora").exists()


def test_a_failed_run_says_why(model, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2, NonFiniteError("nothing but NaN"))
    out = tmp_path / "x"
    assert "nothing but NaN" in refused("train", "--model", model, "--out", out, *TINY)
    assert state(out)["status"] == "failed" and state(out)["error"] == "NonFiniteError: nothing but NaN"
    assert "--resume" in refused("train", "--model", model, "--out", out, *TINY)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (["--epoch", "1"], "no option --epoch; did you mean --epochs"),
        (["--leraning-rate", "1"], "no option --leraning-rate"),
        (["--epochs", "many"], "--epochs=many: give a number"),
        (["--method", "incrlora"], "--method incrlora: not known; did you mean 'increlora'"),
        (["--task", "stdlib"], "'stdlib' is not known; did you mean 'stdlib-docs'"),
        (["--r", "0"], "r=0"),
        (["--r", "-1", "--method", "lora"], "r=-1"),
        (["--epochs", "0"], "--epochs 0: give a number above 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--batch-size", "0"], "--batch-size 0: give at least 1"),
        (["--max-train-samples", "1"], "max_train_samples is 1"),
        (["--target-modules", "qeury"], "qeury.* not found in the base model .*did you mean 'query'"),
        (["--target-modules", "LayerNorm"], "LayerNorm"),
        (["--set", "intervall_steps=3"], "no such option; did you mean 'interval_steps'"),
        (["--set", "top_h"], "--set top_h: write it as key=value"),
        (["--set", "r=3"], "--set r=3: use --r"),
        (["--set", "score=best"], "--set score=best: give 'delta' or 'signed'"),
        (["--set", "beta=x"], "--set beta=x: give a number"),
        (["--set", "top_h=1.5"], "--set top_h=1.5: give an int or none"),
        (["--set", "beta=1.5"], "beta=1.5: give a number in"),
        (["--set", "use_dora=true"], "use_dora=True is not supported"),
        (["--set", "init_r=4"], "r=2 is below the start of init_r=4"),
        (["--set", "total_ranks=11"], "11 ranks is below the start of 12"),
        (["--set", "total_ranks=4000"], "4000 ranks is above the capacity of 192"),
        (["--set", "total_parameters=415"], "415 is below the start of 416"),
        (["--set", "capacity=1"], "capacity"),
        (["--report-to", "foo"], "--report-to foo: not known or not installed; choose one of none"),
        (["--target-modules", "("], r"--target-modules \(: no regular expression"),
        (
            ["--set", "interval_steps=15", "--set", "top_h=2"],
            "leaves 1 growth events of 2 ranks in 20 steps, 6 are needed: 10 of 12",
        ),
    ),
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(model, tmp_path, words, message):
    out = tmp_path / "x"
    assert re.search(message, refused("train", "--model", model, "--out", out, *TINY, *words))
    assert not out.exists()


def test_a_run_in_the_way_is_kept_unless_overwrite_is_given(model, interrupted):
    before = state(interrupted)
    message = refused("train", "--model", model, "--out", interrupted, *TINY)
    assert "already holds a run (interrupted)" in message and "--overwrite" in message
    schedule_error = ("--overwrite", "--set", "interval_steps=15", "--set", "top_h=2")
    refused("train", "--model", model, "--out", interrupted, *TINY, *schedule_error)
    assert state(interrupted) == before
    assert train(model, interrupted, "--overwrite", "--method", "lora", "--epochs", "0.1").exit_code == 0
    assert state(interrupted)["method"] == "lora" and len(rows(interrupted, "metrics.jsonl")) == 2
    assert not (interrupted / "events.jsonl").exists()


def test_a_folder_of_something_else_is_never_overwritten(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    words = ("train", "--model", model, "--out", tmp_path, *TINY, "--overwrite")
    assert "holds files but no run of increlora" in refused(*words)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_out_folder_that_cannot_be_made_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("train", "--model", model, "--out", tmp_path / "file" / "x", *TINY)


def test_missing_and_tampered_weights_are_refused(model, tmp_path):
    words = ("--out", tmp_path / "x", *TINY)
    assert "nowhere" in refused("train", "--model", tmp_path / "nowhere", *words)
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{broken}: cannot be loaded" in refused("train", "--model", broken, *words)
    assert not (tmp_path / "x").exists()


def test_a_mistyped_command_names_the_nearest():
    assert "Did you mean 'train'" in refused("trian")


def test_a_process_exits_with_2_and_no_traceback(tmp_path):
    words = [sys.executable, "-m", "increlora.workbench.cli", "train", "--rr", "8", "--out", str(tmp_path / "x")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no option --rr; did you mean --r?\n")


def test_without_the_extra_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "increlora.workbench.cli.app")
    monkeypatch.delattr(increlora.workbench.cli, "app")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        increlora.workbench.cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the command line needs typer: pip install 'increlora[cli]'\n"


# ------------------------------------------------------------------------------------------------------------- rank map


def test_the_rank_map_tells_layers_and_module_types_apart():
    assert parts("bert.encoder.layer.3.attention.self.query") == ("bert.encoder.layer", "3", "attention.self.query")
    assert parts("lm_head") == ("", "–", "lm_head")
    assert short(["attention.self.query", "attention.output.dense", "output.dense"]) == [
        "query",
        "attention.output.dense",
        "output.dense",
    ]
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(rank_map({"h.0.q": 1, "h.0.v": 12, "h.1.q": 3}))
    lines = [re.findall(r"[\w·]+", line) for line in console.export_text().splitlines()]
    assert ["layer", "q", "v"] in lines and ["0", "1", "12"] in lines and ["1", "3", "·"] in lines


def test_more_rank_is_lighter():
    table = rank_map({"h.0.q": 0, "h.0.v": 5, "h.0.k": 10})
    shades = [next(iter(column.cells)).style for column in table.columns[1:]]
    assert shades == ["white on grey11", "white on grey42", "black on grey78"]


def test_experts_share_a_column_of_the_rank_map():
    table = rank_map({f"h.0.experts.{i}.up": rank for i, rank in enumerate((1, 4, 2))} | {"h.1.experts.0.up": 3})
    assert [str(cell).strip() for cell in table.columns[1].cells] == ["1–4", "3"]


def test_target_modules_are_names_a_shorthand_or_an_expression(model):
    bert, _ = load_classifier(str(model), 2, 0)
    default = target_modules(None, bert)
    assert len(default) == MODULES and not [n for n in default if "pooler" in n or "classifier" in n]
    assert target_modules("query,value", bert) == ["query", "value"]
    assert target_modules("self.query", bert) == ["self.query"]
    for text in ("all-linear", r".*\.(query|key)"):
        assert target_modules(text, bert) == text


def test_head_dropout_leaves_the_trunk_alone(model):
    bert, _ = load_classifier(str(model), 2, 0)
    set_head_dropout(bert, 0.3)
    shares = {name: module.p for name, module in bert.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert shares.pop("dropout") == 0.3 and set(shares.values()) == {0.1}
