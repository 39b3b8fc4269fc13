import pytest
import yaml

from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.preview import describe_mix, load_data_module, preview
from moe_peft.data.sampling import EqualRows, Proportional, Uniform
from tests.conftest import ROOT
from tests.data.toys import ToyBackbone

BACKBONE = {"class_path": "CausalLM", "init_args": {"name": "anything"}}


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def run_config(make_task, tmp_path):
    content = {
        "trainer": {"max_steps": 3},
        "model": {"class_path": "LoRA", "init_args": {"backbone": BACKBONE, "rank": 4}},
        "data": {
            "class_path": "MultitaskDataModule",
            "init_args": {"tasks": [str(make_task("films"))], "sampling": {"class_path": "EqualRows"}},
        },
    }
    return write(tmp_path / "run.yaml", content)


def files(*paths):
    return [part for path in paths for part in ("--config", str(path))]


def test_a_fit_configuration_is_read(run_config):
    data = load_data_module(files(run_config))
    assert data.backbone.name == "anything"
    assert isinstance(data.sampling, EqualRows) and data.batch_size == 16


def test_later_files_overlay_earlier_ones(run_config, make_task, tmp_path):
    more = {"class_path": "TaskFolder", "init_args": {"path": str(make_task("next", kind="multiple_choice"))}}
    init_args = {"tasks+": [more], "batch_size": 4, "sampling": {"class_path": "Proportional"}}
    data = load_data_module(files(run_config, write(tmp_path / "more.yaml", {"data": {"init_args": init_args}})))
    assert [spec.name for spec in data.specs] == ["films", "next"]
    assert data.batch_size == 4 and isinstance(data.sampling, Proportional)


def test_single_arguments_overlay_the_files(run_config):
    data = load_data_module([*files(run_config), "--data.init_args.batch_size", "4", "--data.sampling", "Uniform"])
    assert data.batch_size == 4 and isinstance(data.sampling, Uniform)


@pytest.mark.parametrize(
    ("content", "telling"),
    [
        ({"data": {"class_path": "MultitaskDataModule", "init_args": {"tasks": ["films"]}}}, "required: model"),
        ({"model": {"class_path": "LoRA", "init_args": {"backbone": BACKBONE}}}, "required: data"),
        (["x"], "config"),
    ],
)
def test_a_missing_section_is_named_in_one_line(tmp_path, content, telling):
    with pytest.raises(ValueError, match=telling) as error:
        load_data_module(files(write(tmp_path / "c.yaml", content)))
    assert "\n" not in str(error.value)


def test_preview_shows_rows_template_lengths_and_mix(make_task):
    tasks = [str(make_task("films", train=30)), str(make_task("next", train=10, kind="multiple_choice"))]
    data = MultitaskDataModule(tasks, ToyBackbone(), batch_size=8, sampling=EqualRows(), max_length=7)
    text = preview(data, batches=5)
    lines = [line.split() for line in text.splitlines()]
    assert ["films", "classification", "accuracy", "30", "5", "7", "0"] in lines
    assert "prompt  'film 0 was bad :'" in text and "answer  'negative </s>'" in text
    assert ["films", "train", "30", "7", "7", "7", "7", "0", "0"] in lines
    assert ["films", "20", "50.0%", "20", "of", "30", "75.0%"] in lines
    assert ["next", "20", "50.0%", "10", "of", "10", "25.0%"] in lines


def test_preview_counts_cut_prompts(make_task):
    data = MultitaskDataModule([str(make_task("films", train=30))], ToyBackbone(), batch_size=8, max_length=5)
    assert ["films", "train", "30", "5", "5", "5", "5", "30", "60"] in [
        line.split() for line in preview(data, 1).splitlines()
    ]


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_mixture_is_instantiated(file, tmp_path):
    data = load_data_module(
        files(write(tmp_path / "model.yaml", {"model": {"init_args": {"backbone": BACKBONE}}}), file)
    )
    assert len(data.sources) >= 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["--config", "none.yaml"], "config: "), (["--batches", "0"], "batches: 0 is below 1; give the global batches")],
)
def test_tool_ends_in_one_line_on_a_users_mistake(run_tool, given, expected):
    status, out, errors = run_tool("preview_mix", *given)
    assert (status, out, len(errors)) == (2, [], 1) and errors[0].startswith(f"error: {expected}")


def test_bad_argument_is_one_line(run_config, tmp_path):
    wrong = write(tmp_path / "wrong.yaml", {"data": {"init_args": {"batchsize": 4}}})
    with pytest.raises(ValueError, match="batchsize") as error:
        describe_mix(files(run_config, wrong), 1)
    assert "\n" not in str(error.value)
