"""scripts/mutations.toml fits the code: every formula that it changes exists once, and so do the tests it names."""

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "mutate.py"


@pytest.fixture(scope="module")
def mutate() -> Any:
    spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutate"]


def test_every_mutation_fits_the_code(mutate: Any) -> None:
    mutations = mutate.load()
    assert mutate.stale(mutations) == []
    assert len({m.name for m in mutations}) == len(mutations) >= 80
    for m in mutations:
        assert ast.dump(ast.parse(m.find, mode="eval")) != ast.dump(ast.parse(m.replace, mode="eval")), m.name


def test_a_formula_is_found_however_it_is_written_and_replaced_in_place(
    mutate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src" / "increlora"
    source.mkdir(parents=True)
    method = "class Ä:\n    def f(self, a):\n        return 'ä', a*(  # why\n            a+1) # after\n"
    text = method + "\ndef g(a):\n    return a * (a + 1)\n"
    (source / "x.py").write_text(text)
    copy = tmp_path / "copy"
    (copy / "src" / "increlora").mkdir(parents=True)
    monkeypatch.setattr(mutate, "SOURCE", source)
    mutate.parsed.cache_clear()
    mutate.Mutation("x", "Ä.f", "a * (a + 1)", "a - 1", ()).apply(copy)
    changed = text.replace("a*(  # why\n            a+1)", "(a - 1)")
    assert (copy / "src" / "increlora" / "x.py").read_text() == changed
    for function, find in (("f", "a * (a + 2)"), ("h", "a"), ("g", "a")):  # changed, gone, and there twice
        with pytest.raises(mutate.StaleError, match="occurs [02] times"):
            mutate.Mutation("x", function, find, "0", ()).place()
    mutate.parsed.cache_clear()


def test_a_test_is_named_without_its_folder_and_only_if_there_is_one(mutate: Any) -> None:
    here = "tests/unit/test_mutations.py::test_every_mutation_fits_the_code"
    assert mutate.node_id("test_every_mutation_fits_the_code") == here
    assert mutate.node_id("test_mutations.py::test_every_mutation_fits_the_code") == here
    for test in ("test_no_such_test", "test_probes.py::test_every_mutation_fits_the_code"):
        with pytest.raises(mutate.StaleError, match="is in 0 files"):
            mutate.node_id(test)
