"""The demo around its commands: it waits for the one that is stopped, and names programs as they can be typed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from ltx2_train.cli import demo

SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
signal.pause()
"""
DEMO = """
import sys
from ltx2_train.cli import demo
demo.story = lambda options: [demo.Stage("train", "title", "saves", ())]
sys.exit(demo.main(["--out", sys.argv[1]]))
"""


def test_a_stopped_demo_waits_for_what_its_command_saves(tmp_path):
    (tmp_path / "saves.py").write_text(SAVES)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", DEMO, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if said[-1] == "ready":
                process.send_signal(signal.SIGTERM)  # to the demo alone
    assert process.returncode == 130
    assert said[-3:] == ["saved", "", "Interrupted. The same command goes on from here."]


def test_a_program_that_is_not_on_the_path_is_named_by_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert demo.typed("ltx2-sample") == str(tmp_path / "bin" / "ltx2-sample")
    (tmp_path / "ltx2-sample").touch(mode=0o755)
    assert demo.typed("ltx2-sample") == "ltx2-sample"


def test_the_demo_encodes_for_the_model_that_it_trains():
    stages = {stage.name: stage.arguments for stage in demo.story(demo.parser().parse_args([]))}
    assert "--model=demo" in stages["encode"]
    assert "experiment=demo" in stages["train"]
    assert Path("outputs/demo/latents/train") == Path(stages["train"][4].partition("=")[2])
