"""Results go where they were asked to: whole or not at all, and never over what they are made from."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from expertflow.tracer.errors import ResourceError, UsageError
from expertflow.tracer.outputs import require_place, taking_place
from expertflow.tracer.records import write_json


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"slots": 4, "format": "expertflow.policy/1"}))
    return path


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()

    write_json(pipe, {"a": 1})
    reader.join(20)

    assert pipe.is_fifo()
    assert json.loads(heard[0]) == {"a": 1}
    assert os.listdir(tmp_path) == ["pipe"]


def test_of_a_link_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")

    write_json(link, {"a": 1})

    assert link.is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 1}


def filled_up(path: Path) -> None:
    with taking_place(path) as place:
        place.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    old = tmp_path / "result.json"
    old.write_text("old")

    with pytest.raises(ResourceError, match=r"Cannot write .*result\.json.*Free some space"):
        filled_up(old)

    assert old.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_folder_that_cannot_be_had_is_a_missing_resource(tmp_path):
    (tmp_path / "text.txt").write_text("mine")

    with pytest.raises(ResourceError, match=r"text\.txt is not a folder"):
        require_place(tmp_path / "text.txt" / "deep" / "result.json")
    with pytest.raises(ResourceError, match="Cannot write"):
        write_json(tmp_path / "text.txt" / "result.json", {})
    assert (tmp_path / "text.txt").read_text() == "mine"


def test_a_folder_nobody_may_write_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    with pytest.raises(ResourceError, match="read-only"):
        require_place(tmp_path / "result.json")


def test_a_result_never_takes_the_place_of_what_it_is_made_from(policy):
    with pytest.raises(UsageError, match=r"holds expertflow\.policy"):
        require_place(policy)

    assert require_place(policy, replaces="policy") == policy


@pytest.mark.parametrize(
    "text", ["", "no data", "[1]", '{"format": 7}', '{"format": "expertflow.result/1"}', "{"]
)
def test_results_and_files_of_others_are_replaced_as_asked(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)

    assert require_place(path) == path
    assert require_place(tmp_path / "new" / "folder" / "result.json")
    assert require_place(None) is None
