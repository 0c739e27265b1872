"""Task `stdlib-docs`: honest labels, no leak, the same pairs everywhere."""

import hashlib
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from increlora.errors import TaskError
from increlora.workbench.tasks.stdlib_docs import documented_functions, is_validation, load_pairs

STDLIB = Path(sysconfig.get_path("stdlib"))


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
