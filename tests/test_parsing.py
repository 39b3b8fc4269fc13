"""Files laid over each other: a list replaces the one before, all else is merged."""

import pytest
import yaml

from moe_peft.counting import SECTIONS, model_parser
from moe_peft.data.module import MultitaskDataModule

SOURCE = "moe_peft.data.sources.TaskFolder"
FIRST = {
    "class_path": "moe_peft.data.module.MultitaskDataModule",
    "init_args": {
        "batch_size": 7,
        "tasks": [
            {"class_path": SOURCE, "init_args": {"path": "a", "test_rows": 250}},
            {"class_path": SOURCE, "init_args": {"path": "b", "max_words": 9}},
        ],
    },
}


def laid_over(folder, *sections):
    """The data section of files, each over the one before."""
    parser = model_parser(ignored=[section for section in SECTIONS if section != "data"])
    parser.add_subclass_arguments(MultitaskDataModule, "data", skip={"backbone"})
    files = []
    for number, section in enumerate(sections):
        files.append(f"--config={folder / f'{number}.yaml'}")
        (folder / f"{number}.yaml").write_text(section if isinstance(section, str) else yaml.safe_dump(section))
    model = {"class_path": "LoRA", "init_args": {"backbone": {"class_path": "CausalLM", "init_args": {"name": "x"}}}}
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    return parser.parse_args([f"--config={folder / 'model.yaml'}", *files]).data.as_dict()["init_args"]


@pytest.mark.parametrize("names", [["c"], ["c", "d"], ["c", "d", "e"]])
def test_a_list_inherits_nothing_from_the_one_before(tmp_path, names):
    tasks = [{"class_path": SOURCE, "init_args": {"path": name}} for name in names]
    found = laid_over(tmp_path, {"data": FIRST}, {"data": {"init_args": {"tasks": tasks}}})
    assert [task["init_args"]["path"] for task in found["tasks"]] == names
    assert all(task["init_args"]["test_rows"] is None for task in found["tasks"])
    assert all(task["init_args"]["max_words"] is None for task in found["tasks"])
    assert found["batch_size"] == 7


def test_a_file_without_the_list_keeps_it(tmp_path):
    found = laid_over(tmp_path, {"data": FIRST}, {"data": {"init_args": {"batch_size": 3}}})
    assert [task["init_args"]["test_rows"] for task in found["tasks"]] == [250, None] and found["batch_size"] == 3


def test_a_file_that_is_no_yaml_is_told_of(tmp_path):
    with pytest.raises(Exception, match="Problems parsing config"):
        laid_over(tmp_path, {"data": FIRST}, "a: [1")
