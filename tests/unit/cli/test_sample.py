"""`ltx2-sample`: clips shared by processes, failures told at the end, work that is not done twice, what lies in memory."""

import io
import json
import os
import shutil
import signal
import weakref
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ltx2_train.cli import evaluate, runs, sample
from ltx2_train.cli.components import Components, ComponentsConfig
from ltx2_train.diffusion.profiles import Fit, profile
from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.evals import clips
from ltx2_train.evals.report import write_report
from ltx2_train.media.probe import probe
from ltx2_train.media.write import write_png
from ltx2_train.model.modality import Stream
from ltx2_train.record import TextFeatures
from ltx2_train.testing import run_on_ranks
from ltx2_train.testing.ranks import RankError
from ltx2_train.testing.released import write_release
from ltx2_train.weightfile import open_weights, write_weights
from tests.unit.cli.commands import SMALL, ltx2_train, small_dataset
from tests.unit.media.media_files import ramp_frames

CLIP = ["--frames", "9", "--width", "64", "--height", "64", "--fps", "24"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of one step with the embedded codecs and text encoder, whose data are 9 frames of 32 x 32 at 25."""
    folder = tmp_path_factory.mktemp("sampled")
    data = small_dataset(folder / "latents", text_encoder="hashed-1")
    places = (f"data.datasets.0.path={data}", f"train.run_dir={folder / 'run'}")
    assert ltx2_train(*SMALL, *places, "train.max_steps=1", "train.save_every=1") == 0
    return folder / "run"


@pytest.fixture
def seven(tmp_path) -> Path:
    """A file with seven requests, of which the fourth names a picture that is damaged."""
    write_png(tmp_path / "first.png", ramp_frames(1)[0])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and nothing more")
    entries = [{"prompt": f"ball {i}", "steps": 1, "format": ["wav"], "name": f"clip{i}"} for i in range(7)]
    entries[1] |= {"frames": 17}
    entries[2] |= {"image": "first.png"}
    entries[3] |= {"image": "broken.png"}
    path = tmp_path / "seven.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def on_rank(world: World, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Exit status and what is told, of one command after another."""
    told = []
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = sample.sample(sample.parser().parse_args(command), world)
        told.append((status, out.getvalue(), err.getvalue()))
    return told


def sounds(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.wav")}


# -- many clips, many processes ---


def check_seven(ranks: list[tuple[int, str, str]], folder: Path, out: Path) -> dict[str, bytes]:
    """What all processes tell of seven requests of which one fails; the sounds that are there then."""
    assert [status for status, _, _ in ranks] == [sample.EXIT_SOME] * len(ranks)
    first, *others = ranks
    assert f"seven.jsonl:4 (clip3-0): image={folder}/broken.png: damaged image" in first[2]
    assert "7 clips: 6 made, 0 there already, 1 failed" in first[1]
    assert sum(out.count(" s per step") for _, out, _ in ranks) == 6
    assert not any(err for _, _, err in others), "one process tells it"
    assert all(f"[rank {i}] " in out for i, (_, out, _) in enumerate(others, 1)), "each has its share"
    assert sorted(sounds(out)) == [f"clip{i}-0.wav" for i in (0, 1, 2, 4, 5, 6)]
    return sounds(out)


@pytest.mark.slow
def test_seven_requests_of_which_one_fails_are_made_on_any_number_of_ranks(run, seven, tmp_path):
    outs = {size: tmp_path / f"on-{size}" for size in (2, 3)}
    commands = {size: [str(run), "--requests", str(seven), "--out", str(out)] for size, out in outs.items()}
    single = [str(run), "--prompt", "a ball", "--steps", "1", "--format", "wav", "--out", str(tmp_path / "one")]
    on_two = run_on_ranks(cannot_open_then, 2, [*single, "--count", "4"], commands[2])
    on_three = run_on_ranks(on_rank, 3, commands[3], commands[3], single)
    made = [check_seven([told[1] for told in on_two], tmp_path, outs[2])]
    made += [check_seven([told[0] for told in on_three], tmp_path, outs[3])]
    assert made[0] == made[1], "a clip does not depend on the number of processes"
    assert "7 clips: 0 made, 6 there already, 1 failed" in on_three[0][1][1], "no process has anything to do"
    assert [told[2][0] for told in on_three] == [0, 0, 0], "more processes than clips"
    broken = [told[0] for told in on_two]
    assert [status for status, _, _ in broken] == [sample.EXIT_SOME] * 2
    assert "4 clips: 2 made, 0 there already, 2 failed" in broken[0][1], "the other process goes on"
    assert "and 1 more: OSError: disk failure" in broken[0][2]


def cannot_open_then(world: World, first: list[str], *others: list[str]) -> list[tuple[int, str, str]]:
    """The first command while one process cannot open its codecs, then the others."""
    codecs = Components.codecs
    if world.rank == 1:
        Components.codecs = lambda self, tile=None: (_ for _ in ()).throw(OSError("disk failure"))
    told = on_rank(world, first)
    Components.codecs = codecs
    return told + on_rank(world, *others)


def killed_in_the_third(world: World, arguments: list[str]) -> int:
    """Killed when the third clip's media are written and its receipt is not."""
    write, written = clips.write_json, []

    def write_or_die(path, values):
        if len(written) == 5:  # a list of what is placed and a receipt for each
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        write(path, values)

    clips.write_json = write_or_die
    return sample.main(arguments)


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_or_changed_is_made(run, seven, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(run), "--requests", str(seven), "--out", str(out)]
    with pytest.raises(RankError, match="died without an answer"):
        run_on_ranks(killed_in_the_third, 1, arguments)
    assert (len(sounds(out)), len(list(out.glob("*.json")))) == (3, 2)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.wav") if path.with_suffix(".json").exists()}
    assert sample.main(arguments) == sample.EXIT_SOME
    assert "7 clips: 4 made, 2 there already, 1 failed" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    lines = seven.read_text().splitlines()
    lines[0] = lines[0].replace("ball 0", "another ball")
    lines[3] = lines[3].replace("broken.png", "first.png")
    seven.write_text("\n".join(lines))
    capsys.readouterr()
    assert sample.main(arguments) == 0
    assert "7 clips: 2 made, 5 there already, 0 failed" in capsys.readouterr().out
    assert sample.main([*arguments, "--weights", "raw"]) == 0, "other weights make other clips"
    assert "7 clips: 7 made, 0 there already" in capsys.readouterr().out


def test_clips_of_one_size_are_sampled_together(run, tmp_path, capsys):
    arguments = [str(run), "--prompt", "a ball", "--count", "3", "--batch-size", "2", "--steps", "1", "--format", "wav"]
    assert sample.main([*arguments, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("2 together") == 2


# -- one clip ---


def test_every_kind_of_file_goes_in_and_out(run, tmp_path, capsys):
    common = [str(run), "--steps", "1", "--out", str(tmp_path)]
    assert sample.main([*common, "--prompt", "a ball", "--format", "mp4,wav,png", "--name", "ball"]) == 0
    written = [str(tmp_path / name) for name in ("ball-0.mp4", "ball-0.wav", "ball-0/*.png")]
    assert f"{', '.join(written)}  (" in capsys.readouterr().out, "all of it is told"
    film = tmp_path / "ball-0.mp4"
    assert (probe(film).frames, len(list((tmp_path / "ball-0").iterdir()))) == (9, 9)
    assert sample.main([*common, "--prompt", "from a frame", "--image", str(tmp_path / "ball-0" / "00000.png")]) == 0
    assert sample.main([*common, "--prompt", "to a film", "--video", str(film)]) == 0
    assert sample.main([*common, "--prompt", "to a sound", "--audio", str(tmp_path / "ball-0.wav"), "--fit"]) == 0
    for name in ("from-a-frame", "to-a-film", "to-a-sound"):
        info = probe(tmp_path / f"{name}-0.mp4")
        assert info.has_audio
        assert (info.width, info.height) == (32, 32)
    receipt = json.loads((tmp_path / "to-a-film-0.json").read_text())
    assert receipt["request"]["video"] == str(film)
    assert receipt["model"] == "step 1, ema weights"


def test_one_frame_is_a_picture_of_its_own(run, tmp_path):
    command = [str(run), "--prompt", "a", "--frames", "1", "--steps", "1", "--format", "png", "--out", str(tmp_path)]
    assert sample.main(command) == 0
    assert [path.name for path in (tmp_path / "a-0").iterdir()] == ["00000.png"]


@pytest.mark.parametrize(("built", "trained"), [("[video,audio]", "video"), ("[audio]", "audio")])
def test_a_run_that_trains_one_stream_samples_that_alone(tmp_path, capsys, built, trained):
    """In training, by ltx2-evaluate and by ltx2-sample, whatever its model and its data have beside it."""
    data, run = small_dataset(tmp_path / "latents", 8, text_encoder="hashed-1"), tmp_path / "run"
    places = (f"data.datasets.0.path={data}", f"evaluation.datasets=[{data}]", f"train.run_dir={run}")
    streams = (f"model.streams={built}", f"objective.streams=[{trained}]", "evaluation.heldout=null")
    samples = ("evaluation.samples.clips=1", "evaluation.samples.metrics=[motion,silence]")
    evaluation = (*streams, *samples, "train.max_steps=1", "train.save_every=1", "train.strict_evaluation=true")
    assert ltx2_train(*SMALL, *places, *evaluation) == 0
    assert write_report(run).stat().st_size > 0
    assert evaluate.main([str(run), "--samples", "1", "--metrics", "motion,silence", "--out", str(tmp_path / "e")]) == 0
    for place in (run / "evals" / "samples-00000001", tmp_path / "e" / "samples-00000001"):
        found = json.loads((place / "samples.json").read_text())
        info = probe(place / found["clips"][0]["sampled"]["media"])
        assert (info.has_video, info.has_audio) == (trained == "video", trained == "audio")
        assert found["metrics"]["silence"]["sampled"]["count"] == (trained == "audio"), "else not measured"
    assert sample.main([str(run), "--prompt", "a", "--steps", "1", "--out", str(tmp_path)]) == 0
    info = probe(tmp_path / {"video": "a-0.mp4", "audio": "a-0.wav"}[trained])
    assert (info.has_video, info.has_audio) == (trained == "video", trained == "audio")
    other = {"video": "wav", "audio": "png"}[trained]
    capsys.readouterr()
    assert sample.main([str(run), "--prompt", "b", "--format", other, "--out", str(tmp_path)]) == sample.EXIT_NONE
    assert f"format={other}: this model was trained to make {trained} alone" in capsys.readouterr().err
    refused = f"hq: guides {trained} by the other stream"
    assert sample.main([str(run), "--prompt", "b", "--profile", "hq", "--out", str(tmp_path)]) == sample.EXIT_NONE
    assert refused in capsys.readouterr().err
    assert evaluate.main([str(run), "--samples", "1", "--profile", "hq", "--out", str(tmp_path / "hq")]) == 2
    assert refused in capsys.readouterr().err
    assert ltx2_train(*SMALL, *places, *evaluation, "evaluation.profile=hq") != 0
    assert f"evaluation.profile: sampler profile {refused}" in capsys.readouterr().err


def test_a_profile_of_ones_own_goes_from_training_to_the_clip(tmp_path, monkeypatch):
    """By its place from where the program is called, or beside the file of requests; the run keeps its contents."""
    data, run = small_dataset(tmp_path / "latents", 8, text_encoder="hashed-1"), tmp_path / "run"
    (tmp_path / "mine.yaml").write_text("base: demo\nsteps: 3\n")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "sigmas.yaml").write_text("custom_sigmas: [1, 0.5, 0]\n")
    monkeypatch.chdir(tmp_path)
    places = (f"data.datasets.0.path={data}", f"train.run_dir={run}", "evaluation.profile=mine.yaml")
    assert ltx2_train(*SMALL, *places, "train.max_steps=1", "train.save_every=1", "evaluation.samples=null") == 0
    (tmp_path / "mine.yaml").unlink()
    requests = tmp_path / "list" / "all.jsonl"
    requests.write_text('{"prompt": "a"}\n{"prompt": "b", "profile": "sigmas.yaml"}\n')
    assert sample.main([str(run), "--requests", str(requests), "--out", str(tmp_path / "out")]) == 0
    mine, custom = (json.loads((tmp_path / "out" / f"{name}-0.json").read_text())["profile"] for name in "ab")
    assert (mine["name"], mine["steps"], mine["video"]["cfg"]) == ("mine", 3, 2.0)
    assert (custom["name"], custom["custom_sigmas"]) == ("sigmas", [1, 0.5, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--fps", "inf"], "fps=inf: must be > 0"),
        (["--prompt", "a", "--audio", "none.wav"], "none.wav: no such file"),
        (["--prompt", "a", "--image", "x", "--video", "y"], "video and image: they exclude each other"),
        (["--prompt", "a", "--format", "gif"], "format='gif': not known; choose one of mp4, wav, png"),
        (["--prompt", "a", "--prompt", "A"], "would be called 'a-0'"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size 0: must be >= 1"),
        (["--prompt", "a", "--passes-at-once", "0"], "--passes-at-once 0: must be >= 1"),
        (["--prompt", "a", "--profile", "ltx3"], "ltx3"),
        (["--prompt", "a", "--steps", "0"], "steps=0: must be >= 1"),
        (["--prompt", "a", "--frames", "10"], "nearest: 9"),
        (["--requests", "none.jsonl"], "none.jsonl: cannot be read"),
    ],
)
def test_what_cannot_be_met_is_refused_with_the_next_action(run, arguments, message, capsys):
    assert sample.main([str(run), *arguments]) == sample.EXIT_NONE
    assert message in capsys.readouterr().err


def test_a_run_that_has_not_saved_is_named(run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert sample.main([str(tmp_path), "--prompt", "a"]) == sample.EXIT_NONE
    assert f"{tmp_path} has no complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "fitting"), [("ltx2_2.0", "hq"), ("distilled_2.5", "distilled_2.3")])
def test_a_profile_of_another_generation_is_refused(tmp_path, name, fitting, capsys):
    release = write_release(tmp_path, "2.3")
    arguments = [str(release.transformer), "--prompt", "a", *CLIP, "--profile", name]
    assert sample.main(arguments) == sample.EXIT_NONE
    told = capsys.readouterr().err
    assert name in told
    assert fitting in told


def test_help_shows_every_mode(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    told = capsys.readouterr().out
    assert all(word in told for word in ("--image", "--audio", "--video", "--requests", "torchrun", "exit status"))


def test_options_of_a_request_are_its_fields():
    options = [
        "--image",
        "i.png",
        "--image-crf",
        "33",
        "--seed",
        "0",
        "--no-audio",
        "--fps",
        "12",
        "--format",
        "mp4,png",
    ]
    [one] = sample.read_asked(sample.parser().parse_args(["run", "--prompt", "a", *options]))
    request = one.request
    assert (request.image, request.image_crf, request.silent, request.fps) == ("i.png", 33, True, 12.0)
    assert (request.seed, request.fit, request.format) == (0, False, ["mp4", "png"])


def changed(path: Path, part: str, to: Path) -> Path:
    """A copy with another first tensor among those of a part."""
    weights = dict(open_weights(path).stored)
    key = next(key for key in weights if part in key)
    write_weights(to, weights | {key: weights[key].read() + 1}, safe_open(path, "pt").metadata())
    return to


def test_a_clip_is_known_by_the_contents_of_all_parts(tmp_path):
    """Wherever they lie: another decoder, of which the codec's name says nothing, and another vocoder."""

    def contents(**more):
        places = {"video_codec": release.video_vae, "audio_codec": release.audio_vae, "vocoder": release.vocoder} | more
        return Components(ComponentsConfig(**{name: str(path) for name, path in places.items()})).contents

    release = write_release(tmp_path, "2.5")
    found = contents()
    assert found["text_encoder"] is None, "its place is not known"
    moved = shutil.copy(release.video_vae, tmp_path / "moved.safetensors")
    assert contents(video_codec=moved) == found
    decoder = changed(release.video_vae, "decoder", tmp_path / "decoder.safetensors")
    assert contents(video_codec=decoder)["video_codec"] != found["video_codec"]
    voice = changed(release.vocoder, "vocoder", tmp_path / "voice.safetensors")
    assert contents(vocoder=voice)["audio_codec"] != found["audio_codec"]


def with_two_troubles(world: World, run: Path, arguments: list[str]) -> int:
    """Samples where the second process would find a newer checkpoint, and cannot tell anything."""
    if world.is_main:
        return on_rank(world, [str(run), *arguments])[0][0]
    found = runs.find_checkpoint
    runs.find_checkpoint = lambda place: found(place) if place != run else Path("of another step")
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")) as out:
        out.close()
        return sample.sample(sample.parser().parse_args([str(run), *arguments]), world)


def test_ranks_sample_one_checkpoint_and_need_nobody_who_listens(run, tmp_path):
    arguments = ["--prompt", "a ball", "--count", "2", "--steps", "1", "--format", "wav", "--out", str(tmp_path)]
    assert run_on_ranks(with_two_troubles, 2, run, arguments) == [0, 0]
    assert len(sounds(tmp_path)) == 2


def test_a_checkpoint_that_its_run_has_removed_is_told(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    trained = runs.load_trained(tmp_path / "run")
    shutil.rmtree(trained.checkpoint)
    with pytest.raises(CheckpointError, match=r"removed while it was being opened.*train\.keep_last"):
        trained.model  # noqa: B018


def test_a_place_that_cannot_be_written_is_told_before_the_model_runs(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = [str(run), "--prompt", "a", "--steps", "1", "--out", str(tmp_path / "file" / "sub")]
    assert sample.main(command) == sample.EXIT_NONE
    told = capsys.readouterr()
    assert "file is no directory" in told.err
    assert "per step" not in told.out


# -- memory ---


class Encoder:
    def encode(self, captions: list[str]) -> list[TextFeatures]:
        assert len(set(captions)) == len(captions), "each caption once"
        return [TextFeatures(torch.zeros(1, 4), torch.zeros(1, 4)) for _ in captions]


class Source:
    """Stands for a run, and for what lies around its model."""

    title, profile, keyframe_marker, dtype = "it", profile("demo"), False, torch.float32
    identity, streams, fit = {}, frozenset(Stream), Fit("unknown", frozenset(Stream), 2)

    def __init__(self) -> None:
        self.components = self
        self.encoder: weakref.ref[Encoder] | None = None
        self.is_filled = False

    def text_encoder(self) -> Encoder:
        encoder = Encoder()
        self.encoder = weakref.ref(encoder)
        return encoder

    def codecs(self, tile: object) -> "Source":
        assert not self.is_filled, "codecs come to the device before the model fills it"
        self.video = self.audio = Components(ComponentsConfig(video_codec="dct", audio_codec="dct")).codecs().video
        return self

    @property
    def model(self) -> None:
        assert self.encoder is not None, "captions are encoded first"
        assert self.encoder() is None, "the encoder lies beside the model"
        self.is_filled = True


def test_the_text_encoder_is_gone_when_the_model_is_filled(monkeypatch, tmp_path):
    source = Source()
    monkeypatch.setattr(sample, "open_model", lambda options, checkpoint, device: source)
    assert sample.main(["run", "--prompt", "a", "--count", "2", *CLIP, "--out", str(tmp_path)]) == sample.EXIT_NONE
    assert source.is_filled


@torch.no_grad()
def test_pictures_are_decoded_in_pieces_on_request(tmp_path):
    options = sample.parser().parse_args(["run", "--prompt", "a", "--tile", "64,32"])
    path = str(write_release(tmp_path, "2.3").video_vae)
    components = Components(ComponentsConfig(video_codec=path, audio_codec=path))
    latents = torch.randn(128, 1, 2, 3)
    whole, pieces = (components.codecs(tile).decode(latents, None, 24.0).video for tile in (None, options.tile))
    assert whole.shape == pieces.shape == (3, 1, 64, 96)
    assert not torch.equal(whole, pieces), "seams"
    with pytest.raises(ConfigError, match="--tile: dct-1 decodes a clip as a whole"):
        Components(ComponentsConfig(video_codec="dct", audio_codec="dct")).codecs(options.tile)
