"""The commands of the README's way of the data fit each other: what one writes is what the next is given."""

import re
import shlex
from pathlib import Path

import pytest

from data_prep import encode
from ltx2_train.model.build import transformer_config
from tests.unit.cli.commands import composed

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def commands() -> dict[str, list[str]]:
    """The arguments of each command by its name, without `python -m`."""
    [block] = re.findall(r"```bash\n(python -m data_prep\.synth.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("python -m "), comments=True) for line in lines]
    return {name: arguments for name, *arguments in words}


def after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_what_one_command_of_the_readme_writes_the_next_reads(commands):
    pack, encoded = commands["data_prep.pack"], commands["data_prep.encode"]
    job, out = composed(*commands["ltx2-train"]), after(encoded, "--out")
    assert pack[0] == f"{after(commands['data_prep.synth'], '--out')}/metadata.jsonl"
    assert encoded[0] == after(pack, "--out")
    assert [dataset.path for dataset in job.data.datasets] == commands["ltx2-plan"] == [f"{out}/train"]
    assert job.evaluation.datasets == [f"{out}/heldout"]
    assert commands["ltx2-sample"][0] == commands["ltx2-report"][0] == job.train.run_dir


def test_the_readme_encodes_text_of_the_widths_that_its_model_takes(commands, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        encode, "encode", lambda raw, out, config, *_: asked.update(config=config) or {"all": {"kept": 1}}
    )
    encode.main(commands["data_prep.encode"])
    model = transformer_config(composed(*commands["ltx2-train"]).model)
    config = asked["config"]
    assert (config.video_text_width, config.audio_text_width) == (
        model.video_connector_width,
        model.audio_connector_width,
    )
