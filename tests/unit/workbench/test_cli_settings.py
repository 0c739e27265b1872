"""Settings and recipes: what they say, what they refuse and where, and the plan of a run."""

import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from inspect import Signature
from pathlib import Path
from typing import Literal

import pytest
from typer import Typer
from typer.testing import CliRunner

from increlora import IncreLoraConfig
from increlora.decide.schedules import Run
from increlora.errors import ConfigError, RunFolderError, TaskError
from increlora.hosts.peft.config import CONFIGS
from increlora.methods import Site
from increlora.workbench.cli.app import app
from increlora.workbench.cli.build import target_modules
from increlora.workbench.cli.options import flags, from_flags, option
from increlora.workbench.cli.plan import kinds
from increlora.workbench.cli.settings import FLAGS, TrainSettings, parse_options, read_recipe, refuse_changes, resolve
from increlora.workbench.tasks import sketch
from increlora.workbench.tasks.glue import GLUE

RECIPES = sorted(Path(__file__).parents[3].glob("recipes/paper/*.toml"))


@pytest.mark.parametrize(
    ("pair", "value"),
    (
        ("top_h=3", 3),
        ("warmup_steps=0.1", 0.1),
        ("warmup_steps=100", 100),
        ("lora_alpha=16", 16),
        ("score=signed", "signed"),
        ("score_accumulation=exact", "exact"),
        ("score_window=none", None),
        ("init_lora_weights=false", False),
        ("capacity_pattern={query = 4}", {"query": 4}),
        ("exclude_modules=['pooler.dense']", ["pooler.dense"]),
    ),
)
def test_set_reads_values_as_toml_and_bare_words(pair, value):
    [(key, found)] = parse_options("increlora", [pair]).items()
    assert key == pair.partition("=")[0] and found == value and type(found) is type(value)


@pytest.mark.parametrize("pair", ("lora_alpha=true", "top_h=true", "score=None", "capacity_pattern=4", "seed=1"))
def test_set_refuses_what_the_option_is_not(pair):
    with pytest.raises(ConfigError, match=f"--set {pair}"):
        parse_options("increlora", [pair])


def recipe(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    return path


def test_settings_survive_the_config_file(tmp_path):
    pairs = ["score_window=none", "capacity_pattern={'a.b' = 4}", "score=signed", "lora_alpha=16"]
    settings = resolve({"r": 4, "lr": 2e-5, "target_modules": "query,value"}, pairs)
    text = settings.toml(Path("o"))
    again = read_recipe(recipe(tmp_path, text))
    assert again.peft_config() == settings.peft_config() and again.toml(Path("o")) == text
    assert (again.lr, again.r, again.target_modules) == (2e-5, 4, "query,value")
    words = shlex.split(text.partition("\n")[0])
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert resolve({"r": 4}, sets).options == settings.options


def test_switches_of_the_published_code_need_its_preset(tmp_path):
    refusal = "reserve=frozen: this only reproduces the published code: add --preset paper"
    with pytest.raises(ConfigError, match=f"--set {refusal}"):
        resolve({}, ["reserve=frozen"])
    with pytest.raises(ConfigError, match=f"own.toml, line 2: {refusal}"):
        read_recipe(recipe(tmp_path, '[options]\nreserve = "frozen"\n'))
    with pytest.raises(ConfigError, match="score_accumulation=last: give 'mean' or 'exact'"):
        resolve({}, ["score_accumulation=last"])


def test_switches_of_the_published_code_survive_the_config_file(tmp_path):
    pairs = ["reserve=frozen", "selection=exact", "score_accumulation=last", "top_h=none"]
    settings = resolve({"r": 4, "preset": "paper"}, pairs)
    assert settings.peft_config() == IncreLoraConfig.paper(
        4, target_modules="all-linear", reserve="frozen", selection="exact", score_accumulation="last", top_h=None
    )
    text = settings.toml(Path("o"))
    again = read_recipe(recipe(tmp_path, text))
    assert again.peft_config() == settings.peft_config() and again.toml(Path("o")) == text
    assert "--preset paper" in text and "--set reserve=frozen" in text and "finish" not in text.partition("\n")[0]
    refuse_changes(again, {}, ["reserve=frozen", "finish=keep"], Path("o"))
    with pytest.raises(RunFolderError, match="--set finish keep, not retire"):
        refuse_changes(again, {}, ["finish=retire"], Path("o"))


def test_a_config_file_that_says_of_every_switch_that_it_is_off_is_the_method_itself(tmp_path):
    said = 'reserve = "none"\nselection = "exact"\nscaling = "constant"\nscale_epsilon = 0.0\ngrow_by = 2\n'
    settings = read_recipe(recipe(tmp_path, "[options]\n" + said))
    assert settings.options == {"grow_by": 2} and settings.peft_config().published == {}


def test_every_default_is_the_settings_default():
    assert resolve({}) == TrainSettings()


def test_a_preset_is_resolved_in_the_file_and_stays_short_in_the_command(tmp_path):
    settings = resolve({"preset": "paper", "r": 2}, ["top_h=3"])
    text = settings.toml(Path("o"))
    options = tomllib.loads(text)["options"]
    assert options["scaling"] == "active_rank" and options["orthogonality"] == 0.1
    assert "--preset paper --set top_h=3" in text.partition("\n")[0]
    again = read_recipe(recipe(tmp_path, text))
    assert again.peft_config() == settings.peft_config()


@pytest.mark.parametrize("given", ({"preset": "best"}, {"preset": "paper", "method": "lora"}))
def test_a_preset_that_does_not_exist_is_refused(given):
    with pytest.raises(ConfigError, match="--preset"):
        resolve(given, [])


@dataclass(frozen=True)
class Declared:
    """Settings of nothing: each kind of type that an option may have."""

    share: float = option(0.5, "A share.")
    size: Literal["small", "large"] | int = option("small", "A size.")
    label: str | None = option(None, "A label.", unset="the author's")
    packed: bool = option(False, "Is it packed?")
    inner: Mapping[str, int] = field(default_factory=dict)  # not declared: no flag


def test_a_declared_option_is_a_flag_with_its_help_type_and_default():
    def command(**texts):
        print(from_flags(Declared, texts))

    command.__signature__ = Signature([*flags(Declared)])
    app = Typer()
    app.command()(command)
    shown = re.sub(r"[\s│]+", " ", CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output)
    assert "--share <float> A share. [default: (0.5)]" in shown and "--inner" not in shown
    assert "--size <small|large|int> A size. [default: (small)]" in shown
    assert "--label <str> A label. [default: (the author's)]" in shown
    given = CliRunner().invoke(app, "--share .25 --size 3 --label 7 --packed true".split()).output
    assert given == "{'share': 0.25, 'size': 3, 'label': '7', 'packed': True}\n"
    assert CliRunner().invoke(app, ["--label", "none"]).output == "{'label': None}\n"


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    (
        ("share", "all", "--share=all: give a number"),
        ("share", "true", "--share=true: give a number"),
        ("share", "none", "--share=none: give a number"),
        ("size", "medium", "--size=medium: give 'small' or 'large' or an int"),
        ("packed", "1", "--packed=1: give true or false"),
    ),
)
def test_a_flag_refuses_what_its_type_does_not_allow(name, text, remedy):
    with pytest.raises(ConfigError, match=re.escape(remedy)):
        from_flags(Declared, {name: text})


def test_a_method_shares_but_three_names_with_the_settings_of_a_run():
    """Those that the command line hands to it; any other shared name would be out of reach of `--set`."""
    for config_cls in CONFIGS.values():
        shared = FLAGS.keys() & {declared.name for declared in fields(config_cls)}
        assert shared == {"r", "seed", "target_modules"}, config_cls


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("epoch = 3\n", "line 1: epoch: increlora train has no such option; did you mean 'epochs'"),
        ("r = 4\nepochs = 'many'\n", "line 2: epochs=many: give a number"),
        ("epochs = 2\n\nlr = -1.0\n", "line 3: --lr -1.0: give a number above 0"),
        ("r = 2\n[options]\ntop_hh = 3\n", "line 3: top_hh: increlora has no such option; did you mean 'top_h'"),
        ("[options]\nbeta = 1.5\n", "line 2: beta=1.5: give a number in [0, 1)"),
        ("[options]\nscore = 'best'\n", "line 2: score=best: give 'delta' or 'signed'"),
        ("method = 'incrlora'\n", "line 1: --method incrlora: not known; did you mean 'increlora'"),
        ("r = = 3\n", "cannot be read (Invalid value (at line 1"),
        ("options = 3\n", "line 1: options=3"),
        ("r = 2\nmax_train_samples = 1\n", "line 2: max_train_samples is 1 but a sample needs 2"),
        ("data = 'no/such/place'\n", "line 1: data no/such/place does not exist"),
        ("target_modules = '('\n", "line 1: --target-modules (: no regular expression"),
    ),
)
def test_a_wrong_recipe_names_file_line_and_remedy(tmp_path, text, message):
    path = recipe(tmp_path, text)
    with pytest.raises((ConfigError, TaskError), match=re.escape(message)) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_recipe_is_one_sentence(tmp_path):
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "no.toml")])
    assert result.exit_code == 2 and "cannot be read" in result.stderr


def test_options_given_beside_a_recipe_count(tmp_path):
    table = read_recipe(recipe(tmp_path, "r = 4\nlr = 2e-4\n[options]\ntop_h = 3\nbeta = 0.5\n"))
    settings = resolve({"lr": 1e-2}, ["beta=0.7"], table)
    assert (settings.r, settings.lr, dict(settings.options)) == (4, 1e-2, {"top_h": 3, "beta": 0.7})
    assert resolve({"method": "lora"}, [], table).options == {}  # another method's options mean nothing to it


def test_a_recipes_preset_goes_with_its_method_and_can_be_left_behind(tmp_path):
    table = read_recipe(recipe(tmp_path, "preset = 'paper'\nr = 2\n"))
    assert resolve({}, [], table).preset == "paper"
    assert resolve({"method": "lora"}, [], table).preset is None
    assert resolve({"preset": None}, [], table).preset is None


# ---------------------------------------------------------------------------------------------------------------- plans

# Events and ranks at the end as the published scripts have them, two of which overshoot the budget.
PUBLISHED = {
    "mnli-r2": (36, 37_000, 144), "sst2-r2": (15, 16_000, 144), "cola-r2": (24, 2_500, 144),
    "qqp-r2": (24, 25_000, 144), "qnli-r2": (6, 3_500, 144), "rte-r2": (15, 1_600, 144), "mrpc-r2": (12, 1_300, 144),
    "stsb-r2": (18, 1_900, 144), "mnli-r8": (28, 29_000, 576), "sst2-r8": (21, 22_000, 576),
    "cola-r8": (42, 4_300, 576), "qqp-r8": (42, 43_000, 576), "qnli-r8": (6, 3_500, 600), "rte-r8": (14, 1_500, 576),
    "mrpc-r8": (13, 1_400, 592),
}  # fmt: skip


@pytest.fixture(scope="module")
def deberta():
    """DeBERTaV3-base without weights, made once: a plan needs no more."""
    return sketch("glue/rte", "microsoft/deberta-v3-base")


def test_every_published_setting_has_a_recipe():
    assert {p.stem.removeprefix("increlora-") for p in RECIPES if p.stem.startswith("increlora-")} == set(PUBLISHED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_paper_recipe_loads_and_names_itself(path):
    settings = read_recipe(path)
    assert path.read_text().startswith(f"# increlora train --config recipes/paper/{path.name}")
    model = dict.fromkeys(("lorta", "melora"), "FacebookAI/roberta-base").get(
        settings.method, "microsoft/deberta-v3-base"
    )
    assert settings.preset == "paper" and settings.model == model
    assert settings.task == f"glue/{path.stem.split('-')[1]}" and settings.r == int(path.stem[-1])


@pytest.mark.parametrize("name", ("rte-r2", "qnli-r8"))
def test_the_plan_of_a_paper_recipe_has_the_published_events(name):
    path = next(p for p in RECIPES if p.stem == f"increlora-{name}")
    result = CliRunner().invoke(app, ["train", "--config", str(path), "--dry-run"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = [re.findall(r"[\w,]+", line) for line in result.output.splitlines() if line.startswith("│")]
    events, last, ranks = PUBLISHED[name]
    assert len(rows) == events + 1  # and the start
    assert [int(word.replace(",", "")) for word in (rows[-1][0], rows[-1][2])] == [last, ranks]
    assert f"72 at the start, {ranks} at the end" in result.output


def test_the_forecast_of_every_recipe_agrees_with_the_published_scripts(deberta):
    """All recipes, from the allocator alone: one set of shapes serves them all."""
    modules = {name: deberta.get_submodule(name) for name in target_modules(None, deberta)}
    shapes = {name: (module.in_features, module.out_features) for name, module in modules.items()}
    totals = len(shapes), sum(map(sum, shapes.values()))
    for path in (path for path in RECIPES if path.stem.startswith("increlora-")):
        settings = read_recipe(path)
        method = settings.peft_config().settings().method(*totals)
        made = {site: method.make_delta(Site("x", *site, *totals)) for site in set(shapes.values())}
        deltas = {name: made[site] for name, site in shapes.items()}  # one delta for all modules of a shape
        [rule] = [rule.bind(deltas, method.budget, slot) for slot, rule in enumerate(method.rules)]
        steps = settings.total_steps(GLUE[settings.task.removeprefix("glue/")].train_size)
        found = rule.forecast(rule.holdings(), Run(steps)).events
        events, last, ranks = PUBLISHED[path.stem.removeprefix("increlora-")]
        assert (len(found), found[-1].step, found[-1].ranks) == (events, last, ranks), path.stem


def test_a_method_without_growth_has_a_plan_too():
    result = CliRunner().invoke(app, ["train", "--task", "planted", "--method", "lora", "--r", "2", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "36 at the start, 36 at the end" in result.output and "throughout" in result.output
    assert "growth events" not in result.output
    assert kinds(["a.0.q", "a.1.q", "a.0.v"]) == "2 × q, 1 × v"


def test_a_schedule_that_cannot_spend_the_budget_is_refused_before_anything_is_written(tmp_path):
    words = f"train --task planted --epochs 1 --dry-run --set interval_steps=5000 --out {tmp_path / 'x'}"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2 and "growth events" in result.stderr and not list(tmp_path.iterdir())


def test_a_plan_reads_the_size_of_the_data_without_a_tokenizer(tmp_path, data):
    words = f"train --config {RECIPES[0].parent / 'increlora-mrpc-r2.toml'} --data {data / 'glue'} --dry-run"
    result = CliRunner().invoke(app, [*words.split(), "--max-train-samples", "320", "--epochs", "300"])
    assert result.exit_code == 0, result.output
    assert "320 examples" in result.output and "3,000" in result.output
