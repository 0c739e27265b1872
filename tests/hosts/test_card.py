"""The model card: our section stands once, is right, and leaves the rest of the card alone."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel, get_peft_model

from increlora import IncreLoraConfig, PlainLoraConfig, rank_summary
from increlora.hosts.peft.card import BEGIN, COLUMNS, END, ROWS, escaped, rank_table, with_section
from increlora.naming import grid
from tests.hosts.bases import build_llama, build_mlp, inputs_for, logits
from tests.hosts.tiny import grow, growing

HOSTILE = f"up|`<script>alert(1)</script>`\n## x [a](http://b) {END} _i_ *b*"


@pytest.fixture(scope="module")
def grown():
    """A Llama in mid-growth, with a second adapter beside it."""
    model = get_peft_model(build_llama(), growing(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.add_adapter("second", IncreLoraConfig(r=2, target_modules=["q_proj"]))
    return grow(model, "llama")


def table(text):
    """Rows of the first Markdown table, as a reader's parser sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline, rows = iter(tokens), []
    for token in inline:
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            rows[-1].append("".join(child.content for child in next(inline).children))
        elif token.type == "table_close":
            break
    return rows


def test_the_card_says_where_the_rank_went_and_how_to_load_it(grown, tmp_path):
    grown.save_pretrained(tmp_path)
    text, ranks = (tmp_path / "README.md").read_text(), rank_summary(grown)
    rows = table(text[text.index(BEGIN) :])
    assert rows[0] == ["layer", *"down_proj gate_proj up_proj k_proj o_proj q_proj v_proj".split()]
    shown = {(row[0], kind): int(rank) for row in rows[1:] for kind, rank in zip(rows[0][1:], row[1:])}
    assert (
        shown == {(m.module.split(".")[2], m.module.split(".")[-1]): m.active for m in ranks.modules}
        and max(shown.values()) > 1
    )
    assert f"14 modules hold {ranks.active} ranks (budget {ranks.budget_ranks})" in text
    assert f"{ranks.parameters:,} parameters (budget {ranks.budget_parameters:,})" in text
    assert "import increlora" in text and "increlora export" in text and "`IncreLoraConfig`" in text
    assert {"increlora", "lora"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_an_adapter_in_a_subfolder_has_its_own_card(grown, tmp_path):
    base = str(tmp_path / "base")
    grown.get_base_model().config.save_pretrained(base)
    grown.peft_config["second"].base_model_name_or_path = base
    grown.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "second" / "README.md")
    assert card.data.base_model == base and card.data.library_name == "peft"
    assert "2 modules hold 2 ranks (budget 4)" in card.text
    assert "2 modules" not in (tmp_path / "README.md").read_text()


def test_the_yardstick_has_a_card_too(tmp_path):
    get_peft_model(build_mlp(), PlainLoraConfig(r=2, target_modules=["up", "down"])).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "`PlainLoraConfig`" in text and "2 modules hold 4 ranks (budget 4)" in text


def test_saving_again_changes_our_section_and_nothing_else(tmp_path):
    model = get_peft_model(build_mlp(), growing(target_modules=["up", "down"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    first = path.read_text()
    model.save_pretrained(tmp_path)
    assert path.read_text() == first
    path.write_text(first.replace(BEGIN, f"My own words.\n\n{BEGIN}") + "\n\nMore of them.")
    ranks = rank_summary(grow(model, "mlp")).active
    model.save_pretrained(tmp_path)
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == text.count("## Ranks") == 1
    assert "My own words." in text and text.endswith("More of them.")
    assert ranks > 2 and f"2 modules hold {ranks} ranks" in text and "hold 2 ranks" not in text


def test_a_damaged_section_never_swallows_what_stands_around_it():
    assert with_section(f"a {BEGIN} mine {BEGIN} old {END} z", "new") == f"a {BEGIN} mine new z"
    assert with_section(f"a {END} z", "new") == f"a {END} z\n\nnew\n"
    assert with_section("# T\n\n## Uses\n", "new") == "# T\n\nnew\n\n## Uses\n"


@pytest.mark.parametrize("safe", (True, False))
def test_a_reloaded_adapter_writes_the_same_card(tmp_path, safe):
    model = grow(get_peft_model(build_mlp(), growing(target_modules=["up", "down"])), "mlp")
    model.save_pretrained(tmp_path / "first", safe_serialization=safe)
    again = PeftModel.from_pretrained(build_mlp(), tmp_path / "first")
    torch.testing.assert_close(logits(again, "mlp"), logits(model, "mlp"), rtol=0, atol=0)
    again.save_pretrained(tmp_path / "second", safe_serialization=safe)
    first, second = ((tmp_path / name / "README.md").read_text() for name in ("first", "second"))
    assert first == second and " parameters (budget" in first


def test_only_the_main_process_and_only_beside_weights(tmp_path):
    model = get_peft_model(build_mlp(), growing(target_modules=["up", "down"]))
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "README.md").exists()
    model.peft_config["default"].save_pretrained(tmp_path / "config")
    IncreLoraConfig(target_modules=["up"]).save_pretrained(tmp_path / "config")
    assert [p.name for p in (tmp_path / "config").iterdir()] == ["adapter_config.json"]


def test_a_hostile_module_name_stays_text(tmp_path):
    base = build_mlp()
    base.add_module(HOSTILE, base.up)
    base.forward = lambda x: base.head(x + base.down(torch.relu(getattr(base, HOSTILE)(x))))
    del base.up
    model = get_peft_model(base, growing(target_modules=[HOSTILE, "down"]))
    model(**inputs_for("mlp"))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    text = text[text.index(BEGIN) : text.index(END)]
    assert "<script>" not in text and "(http" not in text
    assert sorted(table(text)[0]) == sorted(["layer", "down", HOSTILE])
    assert len(table(text)) == 2


def test_hundreds_of_modules_make_a_short_table():
    experts = {f"h.{i}.mlp.experts.{j}.{kind}": 1 + (j == 3) for i in range(4) for j in range(64) for kind in "uvw"}
    assert table(rank_table(experts)) == [["layer", "u", "v", "w"], *([str(i), *["1–2"] * 3] for i in range(4))]
    scattered = {f"module{chr(97 + i % 26)}{chr(97 + i // 26)}": i for i in range(300)}
    assert len(scattered) > COLUMNS
    found = table(rank_table(scattered))
    assert len(found) == ROWS + 2 and found[1][1] == "299" and found[-1] == [f"{300 - ROWS} more", f"0–{299 - ROWS}"]


def test_layers_come_in_their_order():
    found = table(rank_table({f"h.{i}.q": i for i in (10, 2, 1)}))
    assert found[1:] == [["1", "1"], ["2", "2"], ["10", "10"]]


def test_two_stacks_of_layers_are_told_apart():
    ranks = {"encoder.block.0.q": 1, "decoder.block.0.q": 2, "lm_head": 3}
    assert list(grid(ranks).cells.values()) == [("encoder.block.0", "q"), ("decoder.block.0", "q"), ("–", "lm_head")]
    assert grid(reversed(ranks)).layers == ["decoder.block.0", "encoder.block.0", "–"]
    assert table(rank_table(ranks))[1:3] == [["decoder.block.0", "2", "·"], ["encoder.block.0", "1", "·"]]


def test_ordinary_names_stay_readable():
    assert escaped("self_attn.q-proj 3") == "self_attn.q-proj 3"
    assert not re.search(r"[<>|`*\[\]]", escaped("<>|`*[]"))
