import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ltx2_train.train.sinks import (
    ConsoleSink,
    JsonlSink,
    SinksConfig,
    Tolerant,
    WandbSink,
    numbers,
    open_evaluation_sinks,
    open_sinks,
    recorded_events,
)

RECORD = {
    "step": 3,
    "time": 1.0,
    "loss_video": 0.51234,
    "loss_audio": None,
    "tokens_per_second": 12345.6,
    "step_seconds": 0.25,
    "data_seconds": 0.01,
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, steps):
    sink = JsonlSink(path)
    for step in steps:
        sink.log({"step": step, "loss": float(step)})
    sink.close()


def test_a_resumed_run_cuts_what_was_logged_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4, 5])
    sink = JsonlSink(path, step=3)
    sink.log({"step": 4, "loss": 44.0})
    sink.close()
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 44.0)]


def test_a_line_torn_by_a_kill_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    with path.open("a") as file:
        file.write('{"step": 2, "loss"')
    JsonlSink(path, step=2).close()
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_a_line_torn_inside_a_character_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    with path.open("ab") as file:
        file.write('{"step": 2, "key": "clé"}'.encode()[:-3])
    JsonlSink(path, step=2).close()
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_a_key_with_a_line_separator_does_not_split_its_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log({"step": 1, "keys": ["a\u2028b", "c\x85d"]})
    sink.close()
    before = path.read_bytes()
    JsonlSink(path, step=1).close()
    assert path.read_bytes() == before


def test_events_of_a_step_are_found_again_and_none_of_a_new_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert recorded_events(path, 3) == set()
    path.write_text(
        '{"step": 0, "event": "a"}\n{"step": 3}\n{"step": 3, "event": "b"}\n{"step": 4, "event": "c"}\n{"st'
    )
    assert recorded_events(path, 3) == {"b"}
    assert recorded_events(path, 0) == set()
    JsonlSink(path, step=0).close()
    assert lines(path) == []


def test_a_record_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(RECORD)
    assert lines(tmp_path / "metrics.jsonl") == [RECORD]


class Disk:
    """A file on a disk with this much room."""

    def __init__(self, path, room):
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, content):
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(content[: self.room])
        self.room -= written
        return written

    def close(self):
        self.file.close()


def test_records_wait_while_the_disk_is_full_and_none_is_lost_or_torn(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.file = Disk(path, room=5)
    for step in (1, 2):
        sink.log({"step": step, "note": "é"})
        assert caplog.text.count("metrics.jsonl CANNOT BE WRITTEN: [Errno 28] No space left") == step
    sink.file.room = 1000
    sink.log({"step": 3})
    sink.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_a_sink_that_fails_is_told_of_once_and_ends_nothing(caplog):
    class Broken(list):
        def log(self, record):
            self.append(record)
            raise ValueError("the tracker is gone")

        def close(self):
            raise ValueError("and stays away")

    broken = Broken()
    sink = Tolerant(broken)
    for step in (1, 2):
        sink.log({"step": step})
    sink.close()
    assert broken == [{"step": 1}]
    assert caplog.text.count("the run goes on without it") == 1
    assert "the tracker is gone" in caplog.text
    Tolerant(Broken()).close()
    assert "and stays away" in caplog.text


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log({"step": 1, "grad_norm": float("nan"), "sigma_bins": {"video": [[0, float("inf")]]}})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "grad_norm": None, "sigma_bins": {"video": [[0, None]]}}]


def test_where_there_is_no_terminal_each_record_is_one_line(caplog):
    with caplog.at_level(logging.INFO):
        sink = ConsoleSink(step=0, max_steps=10, stream=io.StringIO())
        sink.log(RECORD)
        sink.log({"step": 3, "time": 1.0, "event": "checkpoint", "path": "run/step-3"})
    assert "step 3/10  video 0.5123  12,346 tok/s  step 0.25 s, data 0.01 s" in caplog.text
    assert "checkpoint: path run/step-3" in caplog.text


def test_on_a_terminal_the_bar_shows_step_and_losses():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    sink = ConsoleSink(step=2, max_steps=10, stream=stream)
    sink.log(RECORD)
    sink.close()
    assert "3/10" in stream.getvalue()
    assert "video 0.5123" in stream.getvalue()


def test_other_ranks_have_no_sinks(tmp_path):
    assert open_sinks(SinksConfig(), tmp_path, step=0, max_steps=1, settings={}, is_main=False) == []
    assert not (tmp_path / "metrics.jsonl").exists()


def test_nested_records_become_flat_numbers():
    record = {"loss": 1.0, "note": "text", "bins": {"video": [[2, None], [3, 0.5]]}, "gone": None, "nan": float("nan")}
    assert dict(numbers(record)) == {"loss": 1.0, "bins/video/0/0": 2, "bins/video/1/0": 3, "bins/video/1/1": 0.5}


def test_the_tracker_is_imported_only_where_it_is_used():
    code = "import sys, ltx2_train.train.sinks; print('wandb' in sys.modules, 'tqdm' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_an_offline_run_goes_on_under_its_own_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    ids = []
    for step in (0, 3):
        sinks = open_sinks(
            SinksConfig(console=False), tmp_path / "run", step=step, max_steps=6, settings={"optim": {"lr": 0.1}}
        )
        ids.append(sinks[1].sink.run.id)
        for sink in sinks:
            sink.log(RECORD | {"step": step + 1})
            sink.log({"event": "heldout", "step": step + 1, "time": 2.0, "loss_video": 0.4})
            sink.close()
    assert ids[0] == ids[1] == (tmp_path / "run" / "wandb" / "run_id").read_text()
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2


class FakeTracker:
    """What of wandb the sink uses; keeps what it is given."""

    def __init__(self):
        self.settings, self.axes, self.logged = {}, [], []

    def init(self, **settings):
        self.settings = settings
        return self

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values, step=None):
        self.logged.append((step, values))

    def Settings(self, **settings):
        return settings

    def Video(self, path, caption, format):
        return ("film", Path(path).name, caption)

    def Image(self, path):
        return ("picture", Path(path).name)


@pytest.fixture
def tracker(monkeypatch):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def samples_event(folder: Path) -> dict:
    folder.mkdir(parents=True)
    clips = [{"caption": "a ball", "sampled": {"media": "000-sampled.mp4"}}, {"caption": "hidden", "sampled": {}}]
    (folder / "samples.json").write_text(json.dumps({"clips": clips, "sheet": "sheet.png"}))
    return {"event": "samples", "step": 40, "directory": str(folder), "onset_f1": 0.5, "metrics": {"loudness": -20.0}}


def test_evaluations_and_losses_by_sigma_have_stable_names_and_samples_their_films(tracker, tmp_path):
    sink = WandbSink(SinksConfig(), tmp_path / "run", {})
    sink.log({"step": 40, "loss": 1.0, "sigma_bins": {"video": [[2, 0.5], [0, None], [1, 0.25], [1, 1.0]]}})
    sink.log({"event": "heldout", "step": 40, "loss_video": 0.4, "by_sigma": {"video": {"0.1": 0.3}}})
    sink.log(samples_event(tmp_path / "samples"))
    assert tracker.logged == [
        (
            40,
            {
                "loss": 1.0,
                **{f"loss_by_sigma/video/{b}": v for b, v in (("0.0-0.2", 0.5), ("0.5-0.8", 0.25), ("0.8-1.0", 1.0))},
            },
        ),
        (40, {"heldout/loss_video": 0.4, "heldout/by_sigma/video/0.1": 0.3}),
        (
            40,
            {
                "samples/onset_f1": 0.5,
                "samples/metrics/loudness": -20.0,
                "samples/film/0": ("film", "000-sampled.mp4", "a ball"),
                "samples/sheet": ("picture", "sheet.png"),
            },
        ),
    ]


def test_evaluations_beside_a_run_are_a_run_of_their_own_in_its_group(tracker, tmp_path):
    training = WandbSink(SinksConfig(), tmp_path / "run", {}).run.settings
    path = tmp_path / "run" / "evals" / "follow.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"event": "heldout", "step": 20}\n{"event": "heldout", "st')
    sinks = open_evaluation_sinks(SinksConfig(), tmp_path / "run", path, settings={})
    for step in (60, 40):
        for sink in sinks:
            sink.log({"event": "heldout", "step": step, "loss_video": 0.4})
    beside = tracker.settings
    assert beside["id"] != training["id"]
    assert beside["group"] == training["group"] == training["id"]
    assert tracker.axes == [("*", "trained_step")]
    assert tracker.logged == [(None, {"heldout/loss_video": 0.4, "trained_step": step}) for step in (60, 40)]
    assert [line["step"] for line in lines(path)] == [20, 60, 40], "all that was said stays, but for a torn line"


def test_the_tracker_keeps_films_offline(tmp_path):
    import numpy as np
    import torch

    from ltx2_train.media.write import write_mp4, write_png

    event = samples_event(tmp_path / "samples")
    write_mp4(tmp_path / "samples" / "000-sampled.mp4", torch.zeros(3, 9, 32, 32), 24.0, None, 16000)
    write_png(tmp_path / "samples" / "sheet.png", np.zeros((8, 8, 3), dtype=np.uint8))
    sink = WandbSink(SinksConfig(), tmp_path / "run", {})
    sink.log(event)
    sink.close()
    kept = {path.suffix for path in (tmp_path / "run" / "wandb").rglob("media/*/samples/**/*") if path.is_file()}
    assert kept == {".mp4", ".png"}
