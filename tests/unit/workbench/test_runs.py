"""Run folders: whole files or none, and nothing deleted that is not a run's own."""

import json
import os
import platform
import subprocess

import pytest

from increlora.errors import RunFolderError
from increlora.files import whole, write_text
from increlora.workbench import runs
from increlora.workbench.runs import FORMAT, RunFolder, finite


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.create("method = 'x'\n", {"status": "running", "value": float("nan")}, overwrite=False)
    return folder


def test_a_new_run_holds_its_state_and_config(folder):
    assert folder.state() == {"format": FORMAT, "status": "running", "value": None}
    assert folder.config().read_text() == "method = 'x'\n"
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.toml", "run.json"]


def test_a_crash_while_writing_leaves_the_old_file_and_no_other(folder, monkeypatch):
    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        folder.write_state({"status": "finished"})
    monkeypatch.undo()
    assert folder.state()["status"] == "running"
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.toml", "run.json"]


def test_files_reach_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    monkeypatch.setattr(type(tmp_path), "replace", lambda a, b: os.replace(a, b))
    write_text(tmp_path / "a", "text")
    assert calls == ["fsync", "rename", "fsync"] and (tmp_path / "a").read_text() == "text"


def test_a_file_without_a_folder_to_be_in_is_named_itself(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"such/x.html: there is no folder .*no/such; create it first$"):
        write_text(tmp_path / "no" / "such" / "x.html", "text")


def test_a_folder_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), sync(handle)))
    monkeypatch.setattr(type(tmp_path), "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    with whole(tmp_path / "new") as temporary:
        temporary.mkdir()
        for name in "ab":
            (temporary / name).write_text("")
    assert calls == ["fsync"] * 3 + ["rename", "fsync"]  # two files and their folder; then the folder around it


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt), whole(target) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with whole(target) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
            assert not (target / text).exists()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert [p.name for p in target.iterdir()] == ["two"]


def test_a_run_in_the_way_is_named_with_the_remedies(folder):
    with pytest.raises(
        RunFolderError, match="deep/run already holds a run .running.; .*--resume, .*--overwrite, .*--out"
    ):
        folder.create("", {"status": "running"}, overwrite=False)
    folder.write_state({"status": "finished"})
    with pytest.raises(RunFolderError) as caught:
        folder.check_free(overwrite=False)
    assert "--resume" not in str(caught.value)


def test_overwriting_replaces_the_files_of_the_run_and_keeps_all_others(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    (folder.path / "lora").symlink_to(elsewhere)
    (folder.path / "adapter").mkdir()
    (folder.path / "adapter" / "old").write_text("")
    (folder.path / "notes.txt").write_text("mine")
    folder.append("metrics.jsonl", {"step": 1})
    folder.create("", {"status": "running"}, overwrite=True)
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.toml", "notes.txt", "run.json"]
    assert (elsewhere / "precious").exists()


@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize(
    "files",
    (
        {"thesis.tex": "x"},
        {"run.json": '{"status": "finished"}', "adapter": "x"},
        {"run.json": "[1]"},
        {"run.json": '{"format": "other/1"}'},
        {"run.json": "{"},
        {"run.json": '{"format": "increlora-run/999"}'},
    ),
)
def test_what_is_not_a_run_of_ours_is_never_touched(tmp_path, files, overwrite):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunFolderError, match=str(tmp_path)):
        RunFolder(tmp_path).create("", {"status": "running"}, overwrite=overwrite)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == files


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises((RunFolderError, NotADirectoryError), match="out"):
        RunFolder(tmp_path / "out").create("", {"status": "running"}, overwrite=True)
    assert (tmp_path / "out").is_file()


def test_an_empty_folder_is_free(tmp_path):
    RunFolder(tmp_path).create("", {"status": "running"}, overwrite=False)
    assert (tmp_path / "run.json").exists()


def test_what_a_killed_beginning_leaves_is_overwritten_and_nothing_else(tmp_path):
    for name, text in (("ours", "# increlora train --task planted\n"), ("mine", "task = 'planted'\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(text)
        (tmp_path / name / ".run.json.here.1.new").write_text("{")
        with pytest.raises(RunFolderError, match="holds files but no run"):
            RunFolder(tmp_path / name).check_free(overwrite=False)
    RunFolder(tmp_path / "ours").check_free(overwrite=True)
    with pytest.raises(RunFolderError, match="holds files but no run"):
        RunFolder(tmp_path / "mine").check_free(overwrite=True)
    (tmp_path / "mine" / "config.toml").unlink()
    RunFolder(tmp_path / "mine").check_free(overwrite=False)


def test_a_run_that_has_lost_its_config_or_is_being_replaced_is_not_resumed(folder):
    (folder.path / "config.toml").unlink()
    with pytest.raises(RunFolderError, match="has lost its config.toml: start the run anew with --overwrite"):
        folder.config()
    folder.write_state({"status": "replaced"})
    with pytest.raises(RunFolderError, match="is replaced: nothing is left to resume"):
        folder.config()


def test_what_a_dead_process_has_left_goes_and_what_a_live_one_writes_stays(tmp_path):
    path, ended = tmp_path / "adapter", subprocess.Popen(["true"])
    ended.wait()
    dead, live = (f".adapter.{platform.node()}.{number}." for number in (ended.pid, os.getppid()))
    kept = [
        live + "new",
        f".adapter.elsewhere.{ended.pid}.new",
        f".adapter2.{platform.node()}.{ended.pid}.new",
        ".adapter",
    ]
    for name in [dead + "new", *kept]:
        (tmp_path / name).write_text("half")
    (tmp_path / (dead + "old")).mkdir()
    with pytest.raises(KeyError), whole(path):
        raise KeyError
    assert path.is_dir() and {p.name for p in tmp_path.iterdir()} == {"adapter", *kept}
    write_text(tmp_path / "other", "text")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "other", *kept}


def test_rows_survive_a_torn_line_and_are_cut_back(folder):
    for step in range(4):
        folder.append("metrics.jsonl", {"step": step, "loss": float("inf")})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in folder.rows("metrics.jsonl")] == [0, 1, 2, 3]
    folder.append("events.jsonl", {"step": 0})
    folder.append("events.jsonl", {"step": 1})
    folder.rewind(folder.path / "checkpoints" / "checkpoint-1")
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 0, "loss": null}\n{"step": 1, "loss": null}\n'
    assert folder.rows("events.jsonl") == [{"step": 0}]  # that of the first step, which is done
    folder.rewind(None)
    assert folder.rows("metrics.jsonl") == [{"step": 0, "loss": None}] and folder.rows("events.jsonl") == []


def test_the_latest_complete_checkpoint_counts(folder):
    assert folder.checkpoint() is None
    for step, text in {5: "{}", 9: "{}", 10: '{"torn', 20: None}.items():
        checkpoint = folder.path / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        if text is not None:
            (checkpoint / "trainer_state.json").write_text(text)
    assert folder.checkpoint().name == "checkpoint-9"
    assert runs.checkpoint_step(folder.checkpoint()) == 9


def test_only_an_unfinished_run_of_ours_can_be_resumed(folder, tmp_path):
    with pytest.raises(RunFolderError, match="nowhere holds no run to resume"):
        RunFolder(tmp_path / "nowhere").config()
    folder.write_state({"status": "finished"})
    with pytest.raises(RunFolderError, match="run is finished: nothing is left to resume"):
        folder.config()


def test_json_has_no_word_for_what_is_not_finite():
    value = {"a": [1.5, float("nan")], "b": (float("-inf"), "x"), "c": {"d": 2}}
    assert finite(value) == {"a": [1.5, None], "b": [None, "x"], "c": {"d": 2}}
    json.dumps(finite(value), allow_nan=False)
