"""The report page: complete, self-contained, and true to the files it was made of. The figures here are fabricated."""

import base64
import html
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from ltx2_train.cli import report
from ltx2_train.errors import DataError
from ltx2_train.evals import runrecord
from ltx2_train.evals.charts import Level, Series, StepMark, bars, line_chart, number, ticks
from ltx2_train.evals.comparison import differing, short_names, write_comparison
from ltx2_train.evals.files import dataset_directory, write_json
from ltx2_train.evals.heldout import HeldoutLosses, heldout_path
from ltx2_train.evals.identity import differences
from ltx2_train.evals.report import change, duration, headline, smooth, write_report
from ltx2_train.evals.runrecord import read_run
from ltx2_train.evals.samples import samples_directory

ROOT = Path(__file__).resolve().parents[3]
MEDIA = {"00-sampled.mp4": b"sampled film", "00-real.mp4": b"real film", "strip.png": b"frames", "sheet.png": b"sheet"}


def estimate(mean: float) -> dict:
    return {"mean": mean, "low": mean * 0.9, "high": mean * 1.1, "count": 3, "note": ""}


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
    figures |= {"clips": 8, "samples": 8}
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


def test_a_score_that_is_not_there_is_a_dash(run_dir):
    place = run_dir / "evals" / "samples-00000200" / "samples.json"
    samples = json.loads(place.read_text())
    samples["sync"]["sampled"] |= {"f1": None, "chance": None}
    place.write_text(json.dumps(samples))
    text = write_report(run_dir).read_text()
    assert "chance –" in text
    assert "real, through the codec" in text


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


def test_a_missing_clip_is_named_and_costs_nothing_else(run_dir, caplog):
    (run_dir / "evals" / "samples-00000200" / "00-real.mp4").unlink()
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "1 files are named by samples.json and gone: samples-00000200/00-real.mp4." in text
    assert base64.b64encode(MEDIA["00-sampled.mp4"]).decode() in text
    assert "00-real.mp4 is named by samples.json and gone" in caplog.text


def test_a_film_that_goes_while_it_is_read_is_named(run_dir, monkeypatch):
    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr("ltx2_train.evals.embedding.data_uri", gone)
    assert "files are named by samples.json and gone" in write_report(run_dir).read_text(encoding="utf-8")


def test_an_evaluation_that_is_replaced_meanwhile_is_skipped_and_told(run_dir, monkeypatch, caplog):
    read = runrecord.read_contents

    def after_it_went(path):
        if path.name == "samples.json":
            path.unlink()
        return read(path)

    monkeypatch.setattr(runrecord, "read_contents", after_it_went)
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "samples-00000200/samples.json was gone when it was to be read" in text
    assert "from 1.500: 67% lower" in text
    assert "samples.json is gone since it was listed" in caplog.text


def test_folders_of_the_page_are_made_and_a_place_that_cannot_be_is_named(run_dir, tmp_path, capsys):
    assert report.main([str(run_dir), "--out", str(tmp_path / "reports" / "june" / "tuesday.html")]) == 0
    assert (tmp_path / "reports" / "june" / "tuesday.html").exists()
    assert report.main([str(run_dir), "--out", str(tmp_path / "reports")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'reports'}: the page cannot be written there" in said
    assert "--out" in said
    assert [path.name for path in tmp_path.glob("*.partial")] == []
    for size in ("nan", "inf", "-1"):
        assert report.main([str(run_dir), f"--media-mb={size}"]) == 2
        assert f"--media-mb {float(size)}: must be" in capsys.readouterr().err


def test_the_page_is_the_same_where_text_is_ascii(run_dir):
    here = write_report(run_dir).read_bytes()
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-X",
        "utf8=0",
        "-m",
        "ltx2_train.cli.report",
        str(run_dir),
        "--out",
        str(run_dir / "c.html"),
    ]
    subprocess.run(command, env=environment, check=True)
    assert (run_dir / "c.html").read_bytes() == here


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("video", "audio"),
    [
        ([[1.0, 2.0], [2.0, 3.0]], [[NAN, NAN], [NAN, NAN]]),
        ([[1.0, 2.0], [2.0, 3.0]], [[1.0, 2.0], [NAN, NAN]]),
        ([[1.0, INF], [2.0, INF]], [[1.0, 2.0], [2.0, 3.0]]),
        ([[1.0, 2.0]], [[1.0, 2.0]]),
        ([[INF, INF]], [[NAN, NAN]]),
    ],
    ids=["no sound", "one clip with sound", "diverged at one sigma", "one clip", "nothing at all"],
)
def test_losses_without_a_mean_or_an_interval_have_a_page(tmp_path, video, audio):
    keys = tuple(f"k{i}" for i in range(len(video)))
    columns = (torch.tensor(values, dtype=torch.float64) for values in (video, audio))
    found = HeldoutLosses(keys, (0.1, 0.9), *columns, {"data": "d"}).to_dict()
    for step in (1, 2):
        write_json(tmp_path / "evals" / f"heldout-{step:08d}.json", {"step": step, "raw": found})
    (tmp_path / "metrics.jsonl").write_text("")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    charts = re.findall(r"<h3>(\w+), by sigma</h3>", text)
    assert charts == [name for name, rows in (("video", video), ("audio", audio)) if math.isfinite(rows[0][0])]
    assert "<h3>video, by sigma</h3></div>" not in text
    write_comparison([tmp_path, tmp_path], tmp_path / "both.html", [{}, {}])


def measured(step: int, mean: float, identity: dict | None) -> dict:
    told = {} if identity is None else {"identity": identity}
    return {"step": step, "ema": losses(mean) | told}


OWN, OTHER = {"data": "aaaa", "clips": 3}, {"data": "bbbb", "clips": 3}


@pytest.mark.parametrize(
    ("found", "own", "tile", "told"),
    [
        (
            [(0, 1.5, OWN), (100, 1.0, OWN), (200, 7.0, OTHER)],
            [0, 100],
            "from 1.500: 33% lower",
            "step 200 (other data)",
        ),
        ([(0, 1.5, OTHER), (100, 1.0, OWN), (200, 0.5, OWN)], [], "from 1.000: 50% lower", "step 0 (other data)"),
        ([(0, 1.5, None), (100, 1.0, OWN), (200, 0.5, OWN)], [], "from 1.000: 50% lower", "step 0 (one does not say"),
        ([(0, 1.5, None), (100, 1.0, None)], [], "from 1.500: 33% lower", "do not say what they were measured on"),
    ],
    ids=["not the run's own", "older ones", "unknown before known", "all unknown"],
)
def test_losses_of_other_clips_are_left_out_and_the_page_says_so(tmp_path, found, own, tile, told):
    for step, mean, identity in found:
        write_json(tmp_path / "evals" / f"heldout-{step:08d}.json", measured(step, mean, identity))
    lines = [{"event": "heldout", "step": step, "loss_video": 1.0} for step in own]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert tile in text
    notes = text[text.index('<p class="notes"') :]
    assert told in notes[: notes.index("</p>")]
    assert "7.0000" not in text


def test_losses_of_like_clips_need_no_note(tmp_path):
    for step in (0, 100):
        write_json(tmp_path / "evals" / f"heldout-{step:08d}.json", measured(step, 1.0, OWN))
    (tmp_path / "metrics.jsonl").write_text("")
    assert '<p class="notes"' not in write_report(tmp_path).read_text(encoding="utf-8")


def test_samples_of_another_tolerance_are_in_no_curve_with_the_others(run_dir):
    path = run_dir / "evals" / "samples-00000200" / "samples.json"
    newest = json.loads(path.read_text())
    for step, tolerance in ((0, 80), (100, 50), (200, 80)):
        if step < 200:
            add_samples(run_dir, step)
        place = run_dir / "evals" / f"samples-{step:08d}" / "samples.json"
        known = {"step": step, "identity": {"data": "aaaa", "tolerance_ms": tolerance}}
        place.write_text(json.dumps(newest | known))
    assert [sampled.step for sampled in read_run(run_dir).sampled] == [0, 200]
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "Left out: samples of step 100 (tolerance_ms 50 instead of 80)." in text


def test_further_held_out_datasets_are_on_the_page(run_dir):
    second = dataset_directory(run_dir, 1)
    for step, mean in ((0, 3.125), (200, 2.125)):
        write_json(heldout_path(second, step), measured(step, mean, OTHER))
    write_json(samples_directory(second, 200) / "samples.json", {"step": 200, "clips": [], "identity": OTHER})
    text = write_report(run_dir).read_text(encoding="utf-8")
    section = text[text.index("<h2>Held-out loss, evaluation.datasets[1]</h2>") :]
    assert "3.1250" in section
    assert "2.1250" in section
    assert "evaluation.datasets[1]: its samples are not in this page; they lie in" in text
    assert text.count("from 1.500: 67% lower") == 2, "the tiles are of the first dataset"


def test_runs_that_were_measured_on_other_clips_are_told_apart(run_dir):
    other = other_run(run_dir, "other")
    for place, identity in ((run_dir, OWN), (other, OTHER)):
        for step in (0, 200):
            write_json(heldout_path(place, step), measured(step, 1.0, identity))
    third = other_run(run_dir, "third")
    settings = [{"evaluation.datasets.0": name} for name in ("balls", "drums", "balls")]
    page = write_comparison([run_dir, other, third], run_dir / "both.html", settings).read_text(encoding="utf-8")
    text = html.unescape(page)
    difference = f"{differences(OWN, OTHER)}; by their settings drums instead of balls"
    assert f"Held-out loss: other cannot be compared with a run and third ({difference})." in text
    table = text[text.index("<h2>What came of it") : text.index("<h2>Samples")]
    loss = "1.0000 ± 0.1000 at step 200, 0% higher than at step 0"
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in table.split("<tr")[2:]]
    assert [row for row in rows if len(row) == 1 or row[0].startswith("held-out loss, video")] == [
        ["held-out loss of a run and third"],
        ["held-out loss, video (averaged weights)", "", loss, "", loss],
        ["held-out loss of other"],
        ["held-out loss, video (averaged weights)", "", "", loss, ""],
    ]
    charts = re.findall(r"<h3>(Held-out loss, video.*?)</h3>(.*?)</svg>", text)
    assert [(title, re.findall(r'"line (run\d)"', svg)) for title, svg in charts] == [
        ("Held-out loss, video: a run and third", ["run0", "run2"]),
        ("Held-out loss, video: other", ["run1"]),
    ]


def test_each_kind_of_weights_is_set_against_its_own_beginning(run_dir):
    """At first an average lags behind: trained weights beside it would look better than they are."""
    for step, raw, ema in ((0, 2.0, 3.0), (200, 2.1, 2.5)):
        entry = {"step": step, "raw": losses(raw), "ema": losses(ema)}
        write_json(heldout_path(run_dir, step), entry)
    page = html.unescape(write_report(run_dir).read_text(encoding="utf-8"))
    rows = re.findall(r"<td>200</td><td>(\w+ weights)</td>\s*<td>.*?</td><td>(.*?)</td>", page)
    assert rows == [("trained weights", "+0.1000 ± 0.0000"), ("averaged weights", "−0.5000 ± 0.0000")]
    assert "averaged weights, from 3.000: 17% lower" in page


def test_runs_without_an_average_stand_apart_from_those_with_one(run_dir):
    other = other_run(run_dir, "other")
    for step in (0, 200):
        write_json(heldout_path(other, step), {"step": step, "raw": losses(1.0)})
    page = html.unescape(
        write_comparison([run_dir, other], run_dir / "both.html", [{}, {}]).read_text(encoding="utf-8")
    )
    assert "other cannot be compared with a run (weights trained weights instead of averaged weights)" in page
    assert "held-out loss, video (averaged weights)" in page
    assert "held-out loss, video (trained weights)" in page


def test_how_many_clips_are_behind_a_figure_is_told(run_dir):
    path = heldout_path(run_dir, 200)
    found = json.loads(path.read_text())
    found["ema"]["audio"]["mean"] |= {"count": 2, "note": "few clips: the interval is rough under 20"}
    write_json(path, found)
    path = run_dir / "evals" / "samples-00000200" / "samples.json"
    samples = json.loads(path.read_text())
    samples["sync"]["sampled"] |= {"clips": 2, "samples": 8}
    write_json(path, samples)
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "3 clips, audio in 2 of them (few clips: the interval is rough under 20). Training never sees them" in page
    assert "±80 ms, 8 samples of 2 clips" in page
    assert re.findall(r"<td>(sampled|real)</td><td class=\"left\">(.*?)</td>", page)[-2:] == [
        ("sampled", "8 samples of 2 clips"),
        ("real", "8 clips"),
    ]


def test_runs_that_were_measured_alike_stand_in_one_table_and_one_chart(run_dir):
    other = other_run(run_dir, "other")
    text = write_comparison([run_dir, other], run_dir / "both.html", [{}, {}]).read_text(encoding="utf-8")
    assert "cannot be compared" not in text
    assert '<tr class="heading">' not in text
    assert text.count("<h3>Held-out loss, video</h3>") == 1


def test_figures_of_samples_that_were_measured_otherwise_stand_apart_and_their_films_by_caption(run_dir):
    path = run_dir / "evals" / "samples-00000200" / "samples.json"
    newest = json.loads(path.read_text()) | {"metrics": {"wobble": figure(3.5)}}
    path.write_text(json.dumps(newest | {"identity": {"data": "aaaa", "profile": "demo"}}))
    places = {"profile": {"data": "aaaa", "profile": "hq"}, "data": {"data": "bbbb", "profile": "demo"}}
    others = []
    for name, identity in places.items():
        others.append(other_run(run_dir, name))
        (others[-1] / path.relative_to(run_dir)).write_text(json.dumps(newest | {"identity": identity}))
    text = write_comparison([run_dir, *others], run_dir / "all.html", [{}] * 3).read_text(encoding="utf-8")
    headings = re.findall(r'<tr class="heading"><td.*?>(.*?)</td>', text)
    assert headings == ["samples of a run", "samples of profile", "samples of data"]
    films = text[text.index("<h2>Samples") : text.index("<h2>Evaluations")]
    assert re.findall("<(?:h3|figcaption).*?>(.*?)</", films) == [
        "a run and profile, from the same noise",
        *("a run, step 200", "profile, step 200", "real"),
        "data alone: no other run sampled these",
        *("data, step 200", "real"),
    ]


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


def add_samples(directory: Path, step: int, metrics: dict | None = None) -> Path:
    """Samples of an earlier step: the same clip, with films of their own."""
    media = directory / "evals" / f"samples-{step:08d}"
    media.mkdir()
    for name in MEDIA:
        (media / name).write_bytes(f"{name} of {step}".encode())
    newest = json.loads((directory / "evals" / "samples-00000200" / "samples.json").read_text())
    (media / "samples.json").write_text(json.dumps(newest | {"step": step, "metrics": metrics or {}}))
    return media


def figure(value: float | None, **real) -> dict:
    sampled = {"value": value, "low": None, "high": None, "count": 8, "note": "few clips"}
    return {"unit": "furlongs", "sampled": sampled, **real}


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_a_caption_is_shown_at_every_evaluated_step_and_each_film_is_in_the_page_once(run_dir):
    add_samples(run_dir, 0)
    add_samples(run_dir, 100)
    text = write_report(run_dir).read_text()
    row = text[text.index("Samples over time") : text.index("Do picture and sound agree?")]
    assert re.findall("<figcaption>(.*?)</figcaption>", row) == ["step 0", "step 100", "step 200", "real"]
    for film in ("00-sampled.mp4 of 0", "00-sampled.mp4 of 100"):
        assert text.count(encoded(film)) == 1
    assert text.count(base64.b64encode(MEDIA["00-sampled.mp4"]).decode()) == 1
    assert row.count("data-same=") == 2, "the newest sample and the real clip are in the page already"
    assert re.findall('<figure class="newest"><figcaption>(.*?)<', row) == ["step 200"]


def test_of_many_steps_some_are_shown_and_the_page_says_so(run_dir):
    for step in range(100):
        add_samples(run_dir, step)
    text = write_report(run_dir).read_text()
    assert "8 evaluated steps of 101; the others lie in" in text
    assert text.count("<figcaption>step") == 8
    assert "<figcaption>step 0<" in text
    assert "<figcaption>step 200<" in text


def test_the_page_is_bounded_and_names_what_does_not_fit(run_dir):
    old = add_samples(run_dir, 0)
    (old / "00-sampled.mp4").write_bytes(bytes(90_000))
    path = write_report(run_dir, media_bytes=100_000)
    text = path.read_text()
    assert encoded("strip.png of 0") in text, "frames stand for the film"
    assert str(old / "00-sampled.mp4") in text
    assert "1 further files would not fit" in text
    assert len(text) < len(write_report(run_dir, media_bytes=200_000).read_text()) - 90_000


def test_an_old_film_that_is_gone_is_said_and_costs_nothing_else(run_dir):
    (add_samples(run_dir, 0) / "00-sampled.mp4").unlink()
    text = write_report(run_dir).read_text()
    assert "1 files are named by samples.json and gone" in text


def test_figures_are_drawn_whatever_their_names(run_dir):
    media = run_dir / "evals" / "samples-00000200" / "samples.json"
    newest = json.loads(media.read_text())
    real = {"real": {"value": 7.25, "low": 7.0, "high": 7.5, "count": 8, "note": ""}}
    media.write_text(json.dumps(newest | {"metrics": {"wobble": figure(3.5, **real), "hum": figure(None)}}))
    add_samples(run_dir, 0, {"wobble": figure(1.5)})
    text = write_report(run_dir).read_text()
    table = text[text.index("Figures of the samples") :]
    assert re.search(
        r"<td>wobble</td><td class=.left.>furlongs</td><td>3.5</td><td>7.25 \[7, 7.5\]</td><td>1.5</td>", table
    )
    assert re.search(r"<td>hum</td><td class=.left.>furlongs</td><td>–</td><td></td><td></td>", table)
    assert "few clips: wobble, hum" in table
    assert "<h3>wobble</h3>" in table
    assert "<h3>hum</h3>" not in table
    assert "step 0, before training" in table


def test_chance_and_the_first_measurement_are_drawn_apart(run_dir):
    add_samples(run_dir, 100)
    text = write_report(run_dir).read_text()
    chart = text[text.index("<h3>Onset F1 over steps</h3>") :]
    legend = dict(re.findall(r'<span class="key (.*?)"><i></i>(.*?)</span>', chart[: chart.index("</div>")]))
    assert legend["chance"] == "chance"
    assert legend["dashed before"] == "step 100, the first"
    style = dict(re.findall(r"(\.[\w.]+) \{ (.*?) \}", text))
    assert style[".chance"] != style[".before"]
    dashes = [re.search(r"stroke-dasharray: (.*?);", style[name] + ";")[1] for name in (".line.chance", ".level")]
    assert dashes[0] != dashes[1]


def test_what_went_wrong_is_marked_on_the_curves_and_listed(run_dir):
    keys = [f"clip-{i}" for i in range(6)]
    told = [
        {"event": "update_skipped", "step": 50, "reason": "a loss is not finite", "keys": keys},
        {"event": "resumed", "step": 90, "after": "a hang"},
        {"event": "checkpoint", "step": 100, "path": "somewhere"},
        {"event": "earthquake", "step": 120, "magnitude": 6.5},
    ]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in told)
    (run_dir / "evals" / "follow.jsonl").write_text(
        '{"event": "evaluation_failed", "step": 60, "message": "no room"}\n'
    )
    text = write_report(run_dir).read_text()
    section = text[text.index("What happened on the way") :]
    words = re.findall(r'<span class="pill \w+">(.*?)</span>', section)
    assert words == [
        "damaged record left out",
        "update skipped",
        "evaluation failed",
        "started again after a hang",
        "earthquake",
    ]
    assert "clip-3 and 2 more" in section
    assert "magnitude 6.5" in section
    curve = text[text.index("<h3>Training loss</h3>") :]
    assert len(re.findall('class="event ', curve[: curve.index("</svg>")])) == 5


def test_marks_and_levels_lie_where_they_belong():
    series, marks = (
        [Series("a", [0, 10], [0.0, 4.0], "ink")],
        [StepMark(5, "fault", "<bad>"), StepMark(11, "slow", "x")],
    )
    svg = line_chart(series, x_label="x", y_label="y", levels=[Level("before", 8.0, "before")], marks=marks)
    assert svg.count('class="event ') == 1
    assert "&lt;bad&gt;" in svg
    assert [float(x) for x in re.findall(r'class="thin" x1="([\d.]+)"', svg)] == [(52 + 560 - 14) / 2]
    height = float(re.search(r'class="level before" .*? y1="([\d.]+)"', svg)[1])
    assert 14 < height < 30, "the level is above the line and inside the chart"


def other_run(run_dir: Path, name: str) -> Path:
    import shutil

    return shutil.copytree(run_dir, run_dir.with_name(name))


def test_several_runs_are_overlaid_and_stand_side_by_side(run_dir):
    other = other_run(run_dir, "other")
    path = run_dir / "both.html"
    settings = [{"lr": "1e-3", "seed": "0", "train.run_dir": "a"}, {"lr": "2e-3", "seed": "0", "train.run_dir": "b"}]
    text = write_comparison([run_dir, other], path, settings).read_text()
    chart = text[text.index("<h3>Training loss, video") :]
    chart = chart[: chart.index("</svg>")]
    assert chart.count("line run0") == chart.count("line run1") == 1
    assert "<td>lr</td>" in text
    assert "<td>seed</td>" not in text
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions == ["a run, step 200", "other, step 200", "real"]
    assert "0.5000 ± 0.0500 at step 200, 67% lower than at step 0" in text
    assert "step 0, before training" in text


def test_differences_and_names_are_those_that_matter():
    found = differing([{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}])
    assert found == [{"name": "b", "values": ["2", "3"]}, {"name": "c", "values": ["–", "4"]}]
    assert short_names([Path("/x/lr/run"), Path("/x/seed/run")]) == ["lr/run", "seed/run"]
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert short_names([Path("/x/lr/run"), Path("/x/seed/run"), Path("/x/lora")]) == ["lr/run", "seed/run", "lora"]
    assert short_names([Path("/a/lr/run"), Path("/b/lr/run")]) == ["a/lr/run", "b/lr/run"]
    assert short_names([Path("/run"), Path("/x/run"), Path("/x/run")]) == ["/run", "x/run", "x/run"]


def test_a_setting_that_one_run_has_not_is_one_row(tmp_path):
    configs = {
        "all": "lora: null\nengine: {freeze: [], sequence: 0}\n",
        "part": "lora: {rank: 4, alpha: null}\nengine: {freeze: [gate], sequence: 1}\n",
    }
    for name, text in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    rows = differing([report.settings_of(tmp_path / name) for name in configs])
    assert {row["name"]: row["values"] for row in rows} == {
        "engine.sequence": ["0", "1"],
        "lora.rank": ["–", "4"],
        "engine.freeze.0": ["–", "gate"],
    }


def test_more_runs_than_colours_are_refused(run_dir):
    with pytest.raises(DataError, match="at most 8"):
        write_comparison([run_dir] * 9, run_dir / "x.html", [{}] * 9)


@pytest.mark.parametrize(("count", "shown"), [(2, True), (0, False)], ids=["not finite", "no sound"])
def test_a_loss_without_a_value_is_a_dash_or_nothing(run_dir, count, shown):
    path = sorted((run_dir / "evals").glob("heldout-*.json"))[-1]
    found = json.loads(path.read_text())
    missing = {"mean": None, "low": None, "high": None, "count": count, "note": "not finite in 1 of 2 clips"}
    for weights in (value for value in found.values() if isinstance(value, dict)):
        weights["audio"]["mean"] = missing
    path.write_text(json.dumps(found))
    tiles = {tile["label"]: tile for tile in headline(read_run(run_dir))}
    assert tiles["held-out loss, video"]["value"] != "–"
    assert ("held-out loss, audio" in tiles) is shown
    if shown:
        assert (tiles["held-out loss, audio"]["value"], tiles["held-out loss, audio"]["note"]) == ("–", missing["note"])
