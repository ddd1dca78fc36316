"""What composes, what is refused, and in which words."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ltx2_train.cli import entry
from ltx2_train.cli.describe import describe, markdown, setting_names, settings
from ltx2_train.cli.schema import TrainJob, job_from_text, load_job, plain, save_job, to_yaml
from ltx2_train.cli.train import check_profile
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.model.config import named_config
from ltx2_train.train.optim import Schedule
from ltx2_train.train.state import COURSE_SETTINGS, FREE_SETTINGS
from tests.unit.cli.commands import call, composed, message

ROOT = Path(__file__).resolve().parents[3]
DATA = "data.datasets.0.path=somewhere"


def test_arguments_become_one_job_of_plain_dataclasses():
    job = composed(DATA, "model=tiny", "optim.lr=3e-4", "optim.schedule=cosine", "seed=7", "train.max_steps=50")
    assert isinstance(job, TrainJob)
    assert (job.model.name, job.optim.lr, job.optim.schedule) == ("tiny", 3e-4, Schedule.cosine)
    assert (job.data.plan.seed, job.optim.total_steps) == (7, 50)  # tied to seed and max_steps
    assert job.data.datasets[0].path == "somewhere"
    assert job.train.run_dir.startswith("outputs/")


def test_a_mixture_is_a_list():
    job = composed("data.datasets=[{path: a, weight: 3}, {path: b, weight: 1}]")
    assert [(d.path, d.weight) for d in job.data.datasets] == [("a", 3.0), ("b", 1.0)]
    assert job.data.weights == [3.0, 1.0]


def test_values_of_an_experiment_give_way_to_arguments():
    given = composed(DATA, "experiment=demo")
    assert given.optim.lr != composed(DATA).optim.lr
    assert composed(DATA, "experiment=demo", "optim.lr=1").optim.lr == 1.0


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes_and_opens_with_its_contract(path):
    job = composed(DATA, f"experiment={path.stem}", "model.weights=released.safetensors")
    assert job.train.max_steps > 0
    first = path.read_text().splitlines()[:2]
    assert first[0] == "# @package _global_"
    assert len(first[1]) > 20


def test_a_profile_of_another_generation_than_the_released_weights_is_refused():
    job = composed(DATA, "model=ltx2_3_22b", "model.weights=released.safetensors", "evaluation.profile=ltx2_2.0")
    refusal = r"evaluation.profile: .*ltx2_2.0: made for LTX-2.0.*generation 2.3; choose one of ltx2_2.3"
    with pytest.raises(ConfigError, match=refusal):
        check_profile(job, named_config("ltx2_3_22b"))
    job.model.weights = None
    check_profile(job, named_config("ltx2_3_22b"))


@pytest.mark.parametrize("name", ["model", "engine", "lora"])
def test_every_option_of_a_group_composes(name):
    for path in (ROOT / "conf" / name).glob("*.yaml"):
        composed(DATA, f"{name}={path.stem}")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("optim.lrr=1", "optim.lrr: there is no such setting; did you mean optim.lr"),
        ("+optim.lrr=1", "optim.lrr: there is no such setting; did you mean optim.lr"),
        ("lr=1", "did you mean optim.lr?"),
        ("mdel=tiny", "did you mean model?"),
        ("train.max_stepss=4", "did you mean train.max_steps?"),
        ("data.datasets.0.pat=x", "data.datasets.0.pat: there is no such setting; did you mean data.datasets.0.path"),
        ("model=tinny", "did you mean tiny? (there are"),
        ("experiment=dmo", "did you mean demo?"),
        ("+lora=all", "+lora=all: lora is a group that has a choice already. Write lora=all, without +"),
        ("lora.rank=2", "a section that is null: choose an option of its group first (lora=all)"),
        ("lora={rank: 2}", "a section that is null: choose an option of its group first (lora=all)"),
        ("optim.lr=abc", "optim.lr: Value 'abc'"),
        ("train.max_steps=1.5", "train.max_steps: Value '1.5'"),
        ("optim.schedule=cosin", "optim.schedule: Invalid value 'cosin', expected one of [constant, cosine, linear]"),
        ("sinks.wandb_mode=of", "expected one of [offline, online, disabled]"),
        ("optim.lr=-1", "optim.lr=-1.0: must be above 0"),
        ("train.max_steps=0", "train.max_steps=0: must be 1 or more"),
        ("objective.caption_dropout=2", "objective: caption_dropout=2.0"),
        ("data.plan.max_tokens=0", "data: max_tokens = 0"),
        ("engine.grad_clip=0", "engine.grad_clip=0.0: must be above 0, or null"),
        ("ema.decay=1", "ema.decay=1.0: must lie in [0, 1)"),
        ("data.datasets=[]", "data.datasets is empty: give data.datasets.0.path=DIRECTORY"),
        ("data.datasets=[{path: a, weight: 1}, {path: b}]", "give every dataset a weight, or none"),
        ("data.datasets=[{path: a, weight: 0}]", "weight=0.0 of a: must be above 0"),
        ("--bogus-flag", None),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_that_names_it(capsys, argument, said):
    if said is None:
        assert call(lambda job: 0, DATA, argument) == entry.EXIT_ERROR
        return
    error = message(capsys, DATA, argument)
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("ltx2-train: ")


def test_a_missing_setting_says_how_to_give_it(capsys):
    assert "data.datasets.0.path is needed: give data.datasets.0.path=VALUE" in message(capsys)


def test_what_is_no_setting_at_all_says_how_to_write_one(capsys):
    assert "'demo' is not understood: write SETTING=VALUE" in message(capsys, "demo")


def test_a_job_survives_being_written_down(tmp_path):
    job = composed(DATA, "experiment=lora", "model.weights=w", "lora.rank=4", "optim.schedule=cosine", "ema=null")
    save_job(job, tmp_path)
    assert load_job(tmp_path) == job
    assert job_from_text(to_yaml(job), "text") == job
    assert plain(job)["optim"]["schedule"] == "cosine"


def test_a_saved_configuration_composes_through_the_door(tmp_path):
    job = composed(DATA, "model=tiny", "optim.lr=5e-4", f"train.run_dir={tmp_path}")
    save_job(job, tmp_path)
    flags = ("--config-dir", str(tmp_path), "--config-name", "config")
    assert composed(*flags) == job
    assert composed(*flags, "optim.lr=1").optim.lr == 1.0


def test_a_saved_configuration_is_checked_like_any_other(tmp_path, capsys):
    save_job(composed(DATA), tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("warmup_steps:", "warmup_step:"))
    error = message(capsys, "--config-dir", str(tmp_path), "--config-name", "config")
    assert "did you mean optim.warmup_steps" in error
    with pytest.raises(CheckpointError, match="not a configuration of this version"):
        load_job(tmp_path)


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is no run directory"):
        load_job(tmp_path)


def test_a_sweep_gives_each_job_a_directory_of_its_own(tmp_path):
    jobs = []
    arguments = ("-m", DATA, f"train.run_dir={tmp_path}/sweep", "optim.lr=1e-4,3e-4", "seed=0,1")
    assert call(lambda job: jobs.append(job) or 0, *arguments) == 0
    assert [(job.optim.lr, job.seed) for job in jobs] == [(1e-4, 0), (1e-4, 1), (3e-4, 0), (3e-4, 1)]
    places = [Path(job.train.run_dir).relative_to(tmp_path / "sweep").as_posix() for job in jobs]
    assert places[0] == "0-optim.lr=0.0001,seed=0"
    assert len(set(places)) == 4


def test_a_failing_job_of_a_sweep_does_not_take_the_others_along(tmp_path, capsys):
    rates = []
    arguments = ("-m", DATA, f"train.run_dir={tmp_path}", "optim.lr=1e-4,-1,3e-4")
    assert call(lambda job: rates.append(job.optim.lr) or 0, *arguments) == entry.EXIT_ERROR
    assert rates == [1e-4, 3e-4]
    assert "optim.lr=-1.0: must be above 0" in capsys.readouterr().err


def test_the_exit_code_of_the_task_is_that_of_the_program():
    assert call(lambda job: 75, DATA) == 75


def test_an_error_that_no_user_can_cause_keeps_its_traceback():
    def broken(job):
        raise ZeroDivisionError("our own mistake")

    with pytest.raises(ZeroDivisionError):
        call(broken, DATA)


def test_job_names_are_file_names():
    assert entry.job_name(3, ["optim.lr=0.1", "data.datasets.0.path=/a/b", "+x=[1, 2]"]) == "3-optim.lr=0.1,x=_1,_2_"
    assert entry.job_name(0, []) == "0"


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_help_teaches_without_importing_anything_heavy():
    code = (
        "import sys; sys.argv = ['ltx2-train', '--help']; from ltx2_train.cli.train import main; code = main();"
        "heavy = ('torch', 'hydra', 'wandb', 'peft', 'transformers', 'numpy', 'hydra_plugins');"
        "print([m for m in heavy if m in sys.modules], code)"
    )
    out = run_python(code)
    assert out.stdout.splitlines()[-1] == "[] 0"
    for words in ("Examples:", "ltx2-train experiment=demo", "experiment=demo", "model=tiny", "--cfg job", "code 75"):
        assert words in out.stdout


def test_composing_a_job_imports_neither_tracker_nor_adapters():
    code = (
        "import sys; sys.argv = ['ltx2-train', 'data.datasets.0.path=x', '--cfg', 'job'];"
        "from ltx2_train.cli.train import main; main();"
        "print([m for m in ('wandb', 'peft', 'transformers', 'matplotlib', 'jinja2', 'av') if m in sys.modules])"
    )
    assert run_python(code).stdout.splitlines()[-1] == "[]"


def test_help_on_a_section_shows_defaults_and_meanings():
    text = describe(TrainJob, "optim")
    assert "optim.lr = 0.0001\n    Peak learning rate." in text
    assert "(constant, cosine, linear)" in text
    with pytest.raises(ConfigError, match="no such section; there are .*optim"):
        describe(TrainJob, "optimizer")


def test_help_on_an_unknown_section_is_an_error_with_the_known_ones(capsys):
    assert call(lambda job: 0, "--help", "optimm") == entry.EXIT_ERROR
    assert "there are" in capsys.readouterr().err


def test_every_setting_has_a_meaning():
    silent = [s.name for s in settings(TrainJob) if not s.meaning]
    assert silent == []


def test_the_table_of_settings_in_the_documentation_is_up_to_date():
    """To renew it: python -m ltx2_train.cli.describe docs/configuration.md"""
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert markdown(TrainJob) in text


def test_the_documentation_lists_the_settings_that_do_not_define_a_run():
    text = (ROOT / "docs" / "configuration.md").read_text()
    (listed,) = re.findall(r"<!-- free settings -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert set(re.findall(r"`(.+?)`", listed)) == {*FREE_SETTINGS, *COURSE_SETTINGS}


def test_configuration_files_name_only_settings_that_exist():
    known = set(setting_names(TrainJob))
    sections = {name.split(".")[0] for name in known}
    for path in (ROOT / "conf").rglob("*.yaml"):
        loaded = yaml.safe_load(path.read_text())
        if path.parent.name == "experiment":
            assert set(loaded) - {"defaults"} <= sections, path
