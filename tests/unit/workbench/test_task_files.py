"""Rows out of files: every format, every split by name, and one clear sentence for what cannot be read."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from increlora.errors import TaskError
from increlora.workbench.tasks.files import Rows, held_out, read_rows, read_splits, read_table, split_files

ROWS = [{"text": f"row {i}", "n": i} for i in range(4)]


def write(folder, name, rows=ROWS):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        path.write_text("".join(row["text"] for row in rows))
    return path


@pytest.mark.parametrize("name", ("a.parquet", "a.json", "a.jsonl", "k=v/a.parquet"))
def test_every_format_gives_the_same_rows(tmp_path, name):
    assert read_rows([write(tmp_path, name)]).table.to_pylist() == ROWS


@pytest.mark.parametrize("name", ("a.txt", "notes.md", "no_ending"))
def test_any_other_file_is_one_text(tmp_path, name):
    assert read_rows([write(tmp_path, name)]).table.to_pylist() == [{"text": "row 0row 1row 2row 3"}]


def test_a_key_that_the_first_row_lacks_is_kept_and_a_line_separator_is_no_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\n{"a": "z", "b": "w"}\n', encoding="utf-8")
    assert read_rows([path]).table.to_pylist() == [{"a": "x\u2028y", "b": None}, {"a": "z", "b": "w"}]


def test_splits_are_known_by_the_start_of_the_name(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train_5k.jsonl", "Dev.clean.json", "validation_blocks.parquet",
                 "test.txt", "trainer_state.json", "README.md"):  # fmt: skip
        write(tmp_path, name)
    (tmp_path / "train.old.json").mkdir()
    found = {split: [path.name for path in paths] for split, paths in split_files(tmp_path).items()}
    assert found == {
        "train": ["train-00000-of-00002.parquet", "train_5k.jsonl"],
        "validation": ["Dev.clean.json", "validation_blocks.parquet"],
        "test": ["test.txt"],
    }


def test_shards_follow_one_another(tmp_path):
    paths = [write(tmp_path, "train-0.parquet", ROWS[:3]), write(tmp_path, "train-1.parquet", ROWS[3:])]
    assert read_rows(paths).table.to_pylist() == ROWS


def test_the_test_split_stands_in_for_validation_and_the_record_says_so(tmp_path):
    write(tmp_path, "train.parquet")
    write(tmp_path, "test.parquet", ROWS[:1])
    _, validation, source = read_splits(tmp_path)
    assert len(validation.table) == 1
    assert "validation on test.parquet (there is no validation file), sha256 " in source
    write(tmp_path, "valid.parquet", ROWS[:2])
    _, validation, source = read_splits(tmp_path)
    assert len(validation.table) == 2 and "validation on valid.parquet, sha256 " in source


@pytest.mark.parametrize("as_folder", (True, False))
def test_without_a_second_file_the_last_twentieth_is_held_out_and_the_record_says_so(tmp_path, as_folder):
    rows = [{"text": str(i)} for i in range(47)]
    path = write(tmp_path, "all.parquet", rows)
    every, other, source = read_splits(tmp_path if as_folder else path)
    assert other is None and "all.parquet without its last twentieth" in source
    train, validation = every.parts()
    assert train.table.to_pylist() == rows[:45] and validation.table.to_pylist() == rows[45:]


def test_a_file_beside_others_is_read_alone(tmp_path):
    path = write(tmp_path, "train.parquet")
    write(tmp_path, "validation.parquet")
    assert read_splits(path)[1] is None


def test_the_last_twentieth_is_one_row_at_least():
    assert held_out([0, 1, 2]) == ([0, 1], [2])
    assert [len(part) for part in held_out("x" * 100)] == [95, 5]


def test_the_record_knows_data_by_content_not_by_folder(tmp_path):
    sources = [read_splits(write(tmp_path, name))[2] for name in ("a/x.jsonl", "b/x.jsonl")]
    changed = read_splits(write(tmp_path, "c/x.jsonl", ROWS[1:]))[2]
    assert sources[0] == sources[1] != changed


def test_a_sample_is_drawn_by_its_seed_in_order_of_the_rows():
    rows = Rows("x", pa.table({"n": range(100)}))
    drawn = [rows.sample(30, seed).table["n"].to_pylist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0])) and len(drawn[0]) == 30
    assert drawn[0] != drawn[2] and drawn[0] != list(range(30))
    assert rows.sample(None, 0) == rows.sample(100, 0) == rows


def test_text_may_be_large_or_dictionary_encoded():
    words = pa.array(["a", "b", "a"])
    for texts in (words, words.cast(pa.large_string()), words.dictionary_encode(), words.cast(pa.string_view())):
        rows = Rows("x", pa.table({"t": texts}))
        assert rows.first("t") == "a" and rows.text("t") == ["a", "b", "a"]


def test_a_null_is_an_empty_text_where_nulls_may_be():
    rows = Rows("x", pa.table({"t": [None, "a"], "none": pa.nulls(2), "n": [None, 7]}))
    assert rows.text("t", nulls=True) == ["", "a"] and rows.text("none", nulls=True) == ["", ""]
    assert (rows.first("t"), rows.first("none"), rows.first("n")) == ("a", None, 7)
    with pytest.raises(TaskError, match="x: column 't' is null at row 0; remove or correct it"):
        rows.text("t")
    with pytest.raises(TaskError, match="x: column 'n' holds 7, not text, at row 1; remove or correct it"):
        rows.text("n", nulls=True)


@pytest.mark.parametrize(
    "name, content, message",
    (
        ("a.parquet", b"not parquet at all", "a.parquet cannot be read .*; restore, correct or convert it"),
        ("a.parquet", b"", "a.parquet cannot be read"),
        ("a.txt", b"caf\xe9", r"a.txt cannot be read \(.*utf-8.* position 3: .*\); restore, correct or convert it"),
        ("a.json", b'"x"', "a.json cannot be read .*: row 0 is 'x', not an object with named columns"),
        ("a.json", b"[1]", "a.json cannot be read .*: row 0 is '1', not an object"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": }\n', "a.jsonl cannot be read .*: line 3 column 7"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x"}', "a.jsonl cannot be read"),
        ("a.jsonl", b"\n", "a.jsonl has no rows"),
    ),
)
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=message):
        read_splits(tmp_path / name)


def test_a_folder_without_training_data_says_what_it_holds(tmp_path):
    with pytest.raises(TaskError, match=f"{tmp_path} has no training file but no .parquet, .jsonl, .json, .txt; "):
        read_splits(tmp_path)
    write(tmp_path, "validation.json")
    write(tmp_path, "b.json")
    with pytest.raises(TaskError, match=r"no training file but b.json \+ validation.json; give one a name like"):
        read_splits(tmp_path)


def test_one_row_cannot_be_shared_out(tmp_path):
    with pytest.raises(TaskError, match="a.json has one row only"):
        read_splits(write(tmp_path, "a.json", ROWS[:1]))[0].parts()


def test_shards_whose_columns_clash_are_refused(tmp_path):
    paths = [write(tmp_path, "train-0.json"), write(tmp_path, "train-1.json", [{"text": 1, "n": "one"}])]
    with pytest.raises(TaskError, match=r"train-0.json \+ train-1.json cannot be read"):
        read_rows(paths)


def test_files_with_other_columns_are_not_mixed(tmp_path):
    write(tmp_path, "train_a.json")
    write(tmp_path, "train_b.json", [{"question": "?", "answer": "!"}])
    with pytest.raises(TaskError, match=r"train_b.json has the columns question, answer but train_a.json beside it"):
        read_splits(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "text.txt"])
def test_a_mark_of_the_encoding_is_no_part_of_the_text(tmp_path, name):
    text = "a b" if name.endswith("txt") else '{"text": "a b"}'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_table(tmp_path / name).to_pylist() == [{"text": "a b"}]
