"""`increlora export`, `check` and `inspect`: what they print, what they write, and one sentence per error."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

import increlora.workbench.tasks
from increlora import MoraConfig
from increlora.workbench.cli.app import app
from tests.export.test_export_foreign import adalora, save
from tests.hosts.tiny import BUILDERS, grow, growing, logits


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def call(*words: object) -> tuple[int, str]:
    """Exit code and everything that was printed; an error that is not one sentence is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 2:
        assert re.fullmatch(r"error: .+\n", result.stderr), result.output
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a grown adapter of a language model."""
    folder = tmp_path_factory.mktemp("run")
    model = grow(get_peft_model(BUILDERS["llama"](), growing(target_modules=["q_proj", "down_proj"], top_h=1)), "llama")
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(folder / "adapter")
    (folder / "run.json").write_text("{}")
    return folder


# --------------------------------------------------------------------------------------------------------------- export


def test_export_says_ranks_size_padding_and_engines(run: Path, tmp_path: Path) -> None:
    code, text = call("export", run, tmp_path / "lora")
    assert code == 0
    size = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert re.search(
        rf"written to .*lora \(uniform\): \d+ ranks over 4 modules, at most 4; {size:,} bytes, .* \d+% padding", text
    )
    for engine in ("peft", "vllm<0.32", "vllm>=0.32", "sglang", "llama.cpp"):
        assert re.search(rf"^{re.escape(engine)} +serves it *$", text, re.MULTILINE)
    assert "truncated" not in text
    code, text = call("export", run / "adapter", tmp_path / "pattern", "--layout", "pattern")
    assert code == 0 and "(pattern)" in text and " 0% padding" in text
    assert re.search(
        r"^sglang +refuses it, or is wrong .*rank \d, room for exactly 4; export with layout='uniform'",
        text,
        re.MULTILINE,
    )


def test_truncation_lists_the_error_of_each_module(run: Path, tmp_path: Path) -> None:
    code, text = call("export", run, tmp_path / "lora", "--max-rank", 1)
    assert code == 0 and "at most 1" in text
    errors = re.findall(r"(\S+(?:q|down)_proj) +│ +(\d\.\d\de-\d\d)", text)
    assert len(errors) == 4 and [float(e) for _, e in errors] == sorted((float(e) for _, e in errors), reverse=True)


def test_a_merged_model_has_the_adapters_logits(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, *more: object, **options: object) -> tuple[object, None]:
        asked.append((name, *more))
        return BUILDERS[name](), None

    monkeypatch.setattr(increlora.workbench.tasks, "load_causal", load)
    monkeypatch.setattr(increlora.workbench.tasks, "load_classifier", load)
    code, text = call("export", run, tmp_path / "merged", "--merge", "--base", "llama")
    assert code == 0 and "the merged model, for any engine" in text
    model = grow(get_peft_model(BUILDERS["llama"](), growing(target_modules=["q_proj", "down_proj"], top_h=1)), "llama")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, "llama"), logits(model, "llama"), rtol=0, atol=1e-5)
    bert = grow(get_peft_model(BUILDERS["bert"](), growing(target_modules=["query"], task_type="SEQ_CLS")), "bert")
    bert.save_pretrained(tmp_path / "bert")
    assert call("export", tmp_path / "bert", tmp_path / "whole", "--merge", "--base", "bert")[0] == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(merged, "bert"), logits(bert, "bert"), rtol=0, atol=1e-5)
    assert asked == [("llama",), ("bert", 2)]


@pytest.mark.parametrize(("words", "message"), [
    (["--merge", "--max-rank", "2"], "leave out --layout, --max-rank and --tolerance"),
    (["--merge", "--tolerance", "0.2"], "leave out --layout, --max-rank and --tolerance"),
    (["--tolerance", "2"], "tolerance=2.0: give a share of ΔW in [0, 1]"),
    (["--base", "x"], "add --merge"),
    (["--layout", "wide"], "wide"),
    (["--max-rank", "0"], "max_rank=0: give an int of at least 1"),
    (["--merge", "--layout", "uniform"], "error: --merge writes a whole model"),
    (["--max-rnk", "2"], "no option --max-rnk; did you mean --max-rank?"),
    (["--merge"], "adapter does not say which model it belongs to: give --base"),
])  # fmt: skip
def test_wrong_options(words: list[str], message: str, run: Path, tmp_path: Path) -> None:
    code, text = call("export", run, tmp_path / "out", *words)
    assert code == 2 and message in text and not (tmp_path / "out").exists()


def test_what_is_in_the_way_or_unfinished(run: Path, tmp_path: Path) -> None:
    code, text = call("export", run, run)
    assert code == 2 and "exists and is not an export of increlora" in text
    (tmp_path / "run.json").write_text("{}")
    for command in (["export", tmp_path, tmp_path / "out"], ["inspect", tmp_path], ["check", tmp_path]):
        code, text = call(*command)
        assert code == 2 and "it is not finished; resume it" in text


def test_the_folder_one_is_in_is_not_replaced(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (".", tmp_path, f"../{tmp_path.name}"):
        for more in ([], ["--merge", "--base", "llama"]):
            code, text = call("export", run, target, *more)
            assert code == 2 and "is the folder you are in" in text and "name a new one in it" in text
    assert list(tmp_path.iterdir()) == []
    assert call("export", run, "lora")[0] == 0


def test_the_command_shows_what_the_function_warns_of(tmp_path: Path) -> None:
    bert = get_peft_model(BUILDERS["bert"](), growing(target_modules=["query"], task_type="SEQ_CLS"))
    bert.save_pretrained(tmp_path / "bert")
    code, text = call("export", tmp_path / "bert", tmp_path / "lora")  # a warning would be an error here
    assert code == 0 and len(re.findall("classifier: is trained in full", text)) == 2


@pytest.mark.parametrize(("words", "message"), [
    (["inspect", "--foo", "x"], "no option --foo; did you mean --help?"),
    (["--foo"], "no option --foo; did you mean --help?"),
    (["inspect", "--hlep", "x"], "no option --hlep; did you mean --help?"),
    (["report", "x", "--fo", "y"], "no option --fo; did you mean"),
])  # fmt: skip
def test_unknown_options(words: list[str], message: str) -> None:
    code, text = call(*words)
    assert code == 2 and message in text


# ---------------------------------------------------------------------------------------------------------------- check


def test_check_exits_with_0_1_or_2(run: Path, tmp_path: Path) -> None:
    call("export", run, tmp_path / "pattern", "--layout", "pattern")
    assert call("check", tmp_path / "pattern", "--engine", "vllm") == (0, "vllm>=0.32  serves it\n")
    code, text = call("check", tmp_path / "pattern", "--engine", "llama.cpp")
    assert code == 1 and "without a warning; export with layout='uniform'" in text
    code, text = call("check", tmp_path / "pattern", "--engine", "vllm", "--max-lora-rank", 1)
    assert code == 1 and "rank 4 is above the server's limit 1; export with max_rank=1 (--max-rank 1)" in text
    code, text = call("check", tmp_path / "pattern")
    assert code == 1 and text.count("\n") == 5
    code, text = call("check", tmp_path / "pattern", "--engine", "sglnag")
    assert code == 2 and "did you mean 'sglang'?" in text
    code, text = call("check", tmp_path / "nowhere")
    assert code == 2 and text.count("nowhere") == 1
    assert "nowhere/adapter_config.json: No such file or directory; give the folder of an adapter, or a run" in text


# -------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_ranks_and_budget_of_a_run(run: Path) -> None:
    code, text = call("inspect", run)
    ranks = json.loads((run / "adapter" / "adapter_config.json").read_text())["ranks"]
    assert code == 0 and "INCRELORA, native" in text
    assert re.search(
        rf"ranks +{sum(ranks.values())} of 12 over 4 modules: mean {sum(ranks.values()) / 4:.2f}, from 1 to", text
    )
    rows = re.findall(r"│ +(\d) │ +(\d+) │ +(\d+) │", text)
    assert [sorted(map(int, row[1:])) for row in rows] == [
        sorted(rank for name, rank in ranks.items() if f"layers.{row[0]}." in name) for row in rows
    ]
    assert re.search(r"parameters +\d+ of 432\s", text)  # 3 · (2·(16+16) + 2·(24+16))


@pytest.mark.parametrize(
    ("operator", "says"), [("sharing", "makes plain LoRA of it"), ("rotation", "it has no low rank")]
)
def test_inspect_says_what_an_export_would_be(operator: str, says: str, tmp_path: Path) -> None:
    model = get_peft_model(BUILDERS["llama"](), MoraConfig(r=2, operator=operator, target_modules=["up_proj"]))
    model.save_pretrained(tmp_path)
    assert "MORA, native: increlora loads it" in call("inspect", tmp_path)[1]
    assert says in call("inspect", tmp_path)[1]


def test_inspect_reads_lora_and_adalora(run: Path, tmp_path: Path) -> None:
    call("export", run, tmp_path / "lora")
    assert "LORA, rank 4 for all" in call("inspect", tmp_path / "lora")[1]
    call("export", run, tmp_path / "lora", "--layout", "pattern")
    assert re.search(r"LORA, a rank for each, \d to 4", call("inspect", tmp_path / "lora")[1])
    save(adalora(), tmp_path / "ada")
    code, text = call("inspect", tmp_path / "ada")
    assert code == 0 and "ADALORA, peft's triplets" in text and "18 over 6 modules: mean 3.00, from 0 to" in text
    bert = get_peft_model(BUILDERS["bert"](), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    bert.save_pretrained(tmp_path / "fresh")
    code, text = call("inspect", tmp_path / "fresh")
    assert code == 0 and "0 over 2 modules" in text and "34 parameters trained in full" in text


def test_long_names_are_never_cut(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = f"/models/{'a' * 90}/base"
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    assert name in re.sub(r"\s", "", call("inspect", tmp_path / "adapter")[1])


HOSTILE = {
    "r": {"r": "many"}, "zero": {"r": 0}, "list": {"rank_pattern": [1]}, "regex": {"rank_pattern": {"(": 2}},
    "alpha": {"lora_alpha": None}, "nan pattern": {"alpha_pattern": {"up": "x"}}, "layers": {"layers_pattern": "x"},
    "type": {"peft_type": ["LORA"]}, "unknown": {"peft_type": "VERA"}, "no type": {"peft_type": None},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_senseless_configs_are_one_sentence(name: str, tmp_path: Path) -> None:
    get_peft_model(BUILDERS["mlp"](), LoraConfig(target_modules=["up"])).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | HOSTILE[name]))
    for command in (["inspect", path.parent], ["export", path.parent, tmp_path / "out"]):
        code, text = call(*command)
        assert code == 2, text
    assert call("check", path.parent)[0] in (1, 2) or name == "layers"


def test_damaged_and_hostile_files_are_one_sentence(run: Path, tmp_path: Path) -> None:
    get_peft_model(BUILDERS["mlp"](), LoraConfig(target_modules=["up"])).save_pretrained(tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    evil = "base_model.model.\x1b[2Jup[/red]"
    for found, message in (
        ({key.replace("base_model.model.up", evil): value for key, value in tensors.items()}, "not printable"),
        ({key: value.flatten()[0] for key, value in tensors.items()}, "is not a linear map"),
        ({}, "damaged or empty"),
    ):
        save_file(found, weights)
        code, text = call("inspect", weights.parent)
        assert code == 2 and message in text and "\x1b" not in text
    save_file({key.replace("model.up", "model.[/red]"): value for key, value in tensors.items()}, weights)
    assert call("inspect", weights.parent)[0] == 0  # a name is no markup
    weights.write_bytes(b"x" * 40)
    for command in ("inspect", "check"):
        code, text = call(command, weights.parent)
        assert code == 2 and "damaged or truncated" in text
