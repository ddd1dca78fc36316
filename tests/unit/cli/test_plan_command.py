import subprocess
import sys

import pytest

from ltx2_train.cli.plan import main
from ltx2_train.record import INDEX_NAME, Bucket
from ltx2_train.testing.shards import random_sample, write_latent_dataset

BUCKETS = (Bucket(2, 2, 2, 5), Bucket(1, 2, 2, 0))


@pytest.fixture
def directory(tmp_path):
    write_latent_dataset(tmp_path / "set", [random_sample(f"k{i:02d}", BUCKETS[i % 10 == 0]) for i in range(50)])
    return str(tmp_path / "set")


def test_it_shows_buckets_steps_occupancy_spread_and_world_sizes(directory, capsys):
    settings = ["--micro-batches", "2", "--max-tokens", "52", "--world", "4"]
    assert main([directory, *settings]) == 0
    out = capsys.readouterr().out
    for fact in (
        "50 samples in 7 shards",
        "2x2x2+5",
        "45",
        "605 tokens",
        "of the token budget",
        "worst 1.00",
        "valid numbers of data ranks",
    ):
        assert fact in out
    assert "on 4 processes: 1 micro-batches per process and step, each planned one cut into 2 parts" in out


def test_a_mixture_shows_its_shares(directory, tmp_path, capsys):
    write_latent_dataset(tmp_path / "images", [random_sample(f"i{i}", BUCKETS[1]) for i in range(5)])
    assert main([directory, str(tmp_path / "images"), "--weights", "3", "1"]) == 0
    assert "1x2x2+0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "5", "--split", "1"], "valid numbers are 1"),
        (["--weights", "1", "2"], "one number > 0 for each of the 1 datasets"),
        (["--max-tokens", "10"], "set max_tokens >= 13"),
        (["--steps", "0"], "--steps 0"),
    ],
)
def test_a_mistake_gets_one_line_and_a_status(directory, arguments, message, capsys):
    assert main([directory, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_lost_index_is_rebuilt(directory, tmp_path, capsys):
    (tmp_path / "set" / INDEX_NAME).unlink()
    assert main([directory]) == 2
    assert "--rebuild-index" in capsys.readouterr().err
    assert main([directory, "--rebuild-index", "--verify"]) == 0


def test_help_teaches_and_needs_no_torch():
    code = (
        "import sys; from ltx2_train.cli.plan import parser; parser().print_help(); assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "examples:" in shown
    assert "micro-batches over ALL processes" in shown
