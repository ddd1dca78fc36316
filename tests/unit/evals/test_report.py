"""The report page: complete, self-contained, and true to the files it was made of. The figures here are fabricated."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ltx2_train.errors import DataError
from ltx2_train.evals.charts import Series, bars, line_chart, number, ticks
from ltx2_train.evals.report import change, duration, read_run, smooth, write_report

MEDIA = {"00-sampled.mp4": b"sampled film", "00-real.mp4": b"real film", "strip.png": b"frames", "sheet.png": b"sheet"}


def estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean * 0.9, "high": mean * 1.1}


def losses(mean: float) -> dict:
    modality = {"mean": estimate(mean), "by_sigma": [estimate(mean * f) for f in (0.8, 1.0, 1.2)]}
    modality["per_clip"] = [mean - 0.1, mean, mean + 0.1]
    return {"clips": 3, "keys": ["a", "b", "c"], "sigmas": [0.1, 0.5, 0.9], "video": modality, "audio": modality}


def step_line(step: int) -> dict:
    loss = 0.3 + math.exp(-step / 100)
    bins = [[4, loss * (1 + b / 10)] if b % 3 else [0, None] for b in range(10)]
    return {
        "step": step,
        "time": 0.3 * step,
        "loss": 2 * loss,
        "loss_video": loss,
        "loss_audio": loss if step % 7 else None,
        "grad_norm": 1 / step,
        "lr": 1e-3,
        "tokens_per_second": 4000.0,
        "samples_per_second": 50.0,
        "step_seconds": 0.3,
        "data_seconds": 0.003,
        "sigma_bins": {"video": bins, "audio": bins},
    }


def side(name: str) -> dict:
    marks = {"impacts": [0.4, 0.9], "onsets": [0.41]}
    return {
        "media": f"00-{name}.mp4",
        "strip": "strip.png",
        "mel": "strip.png",
        "peaks": [0.0, 1.0, 0.5],
        "seconds": 1.7,
        **marks,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run as training, held-out evaluation and sampling leave it."""
    directory = tmp_path / "a run"
    media = directory / "evals" / "samples-00000200"
    media.mkdir(parents=True)
    for name, content in MEDIA.items():
        (media / name).write_bytes(content)
    figures = {"f1": 0.61, "chance": 0.21, "impacts": 40, "onsets": 44, "matched": 26, "tolerance_ms": 80.0}
    clip = {"key": "k", "caption": "a <red> ball", "seed": 1, "sampled": side("sampled"), "real": side("real")}
    samples = {"step": 200, "weights": "ema", "profile": "demo", "count": 8, "clips": [clip], "sheet": "sheet.png"}
    (media / "samples.json").write_text(json.dumps(samples | {"sync": {"sampled": figures, "real": figures}}))
    for step, mean in ((0, 1.5), (200, 0.5)):
        entry = {"step": step, "raw": losses(mean), "ema": losses(mean)}
        (directory / "evals" / f"heldout-{step:08d}.json").write_text(json.dumps(entry))
    bad = {"event": "bad_record", "step": 3, "message": "clip-7: video holds NaN"}
    lines = [step_line(step) for step in range(1, 201)] + [bad]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "config.yaml").write_text("seed: 0\nname: <demo>\n")
    return directory


class Page(HTMLParser):
    """Collects the tags and every address the page would load."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_but_itself(run_dir):
    text = write_report(run_dir).read_text()
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)


def test_the_page_holds_the_samples_beside_the_real_clips(run_dir):
    text = write_report(run_dir).read_text()
    for content in MEDIA.values():
        assert base64.b64encode(content).decode() in text
    assert Page(text).tags.count("video") == 2


def test_the_page_tells_before_and_after_sync_and_what_was_left_out(run_dir):
    text = write_report(run_dir).read_text()
    assert "from 1.500: 67% lower" in text
    assert "0.61" in text
    assert "chance 0.21" in text
    assert "clip-7: video holds NaN" in text


def test_text_from_captions_and_configs_is_escaped(run_dir):
    text = write_report(run_dir).read_text()
    assert "a &lt;red&gt; ball" in text
    assert "name: &lt;demo&gt;" in text


def test_a_run_without_evaluations_has_a_page_of_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step_line(step)) + "\n" for step in range(1, 30)))
    text = write_report(tmp_path).read_text()
    assert "Training loss" in text
    assert "Samples" not in text


def test_a_run_of_no_steps_still_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no step was logged" in write_report(tmp_path).read_text()


def test_the_half_line_of_a_killed_run_is_passed_over(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "los')
    assert read_run(run_dir).steps[-1]["step"] == 200


def test_a_resumed_run_counts_a_step_once(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(150)) + "\n")
    steps = [line["step"] for line in read_run(run_dir).steps]
    assert steps == sorted(set(steps))


def test_a_directory_without_metrics_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


def test_a_missing_clip_is_named(run_dir):
    (run_dir / "evals" / "samples-00000200" / "00-real.mp4").unlink()
    with pytest.raises(DataError, match=r"00-real\.mp4"):
        write_report(run_dir)


def test_a_gap_in_a_series_interrupts_its_line():
    svg = line_chart([Series("a", [1, 2, 3, 4], [1.0, math.nan, 2.0, 3.0], "ink")], x_label="x", y_label="y")
    assert svg.count("<polyline") == 2
    assert "nan" not in svg


def test_no_values_make_no_chart():
    assert line_chart([Series("a", [1], [math.nan], "ink")], x_label="x", y_label="y") == ""


def test_bars_keep_their_values_readable():
    assert "0.61" in bars([("sampled", 0.61, 0.5, 0.7, "video")])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0037), (3, 2000), (-2, 7)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 11
    assert low <= found[0] < found[-1] <= high


def test_numbers_are_short():
    assert [number(x) for x in (0, 0.51234, 1234, 45678, 2.5e6, 1e-5)] == [
        "0",
        "0.512",
        "1234",
        "45.7k",
        "2.5M",
        "1e-05",
    ]


def test_a_running_mean_of_a_constant_is_that_constant():
    assert smooth([2.0] * 200) == pytest.approx([2.0] * 200)


def test_changes_and_durations_read_as_words():
    assert change(2.0, 1.0) == "50% lower"
    assert [duration(s) for s in (12, 75, 3700)] == ["12 s", "1 min 15 s", "1 h 1 min"]
