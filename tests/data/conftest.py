"""A data module of two tiny tasks."""

import pytest

from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.sources import TaskFolder
from tests.data.toys import ToyBackbone


@pytest.fixture
def make_data(make_task):
    """Builder of a data module with a classification and a multiple-choice task."""

    def make(kind="causal", **arguments):
        tasks = [
            str(make_task("films", train=30)),
            TaskFolder(str(make_task("next", train=11, kind="multiple_choice"))),
        ]
        return MultitaskDataModule(tasks, ToyBackbone(kind), **{"batch_size": 8, **arguments})

    return make
