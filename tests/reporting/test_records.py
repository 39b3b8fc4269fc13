"""Reading a run folder: by column names, only whole lines, one line of error for what cannot be read."""

import json

import numpy as np
import pytest

from moe_peft.reporting.records import Gate, Metric, Point, Use, latest, of_best_split, read_records
from moe_peft.reporting.routing import grid, shares
from moe_peft.reporting.run import Run
from tests.reporting.toy_runs import STEPS, ToyRun, layers_of


def test_columns_are_read_by_name_and_unknown_ones_ignored(tmp_path):
    file = tmp_path / "gates.csv"
    file.write_text("note,magnitude,omega,layer,step\nx,0.25,0.75,q,7\nx,,0.5,k,7\n")
    first, second = read_records(file, Gate)
    assert first == Gate(step=7, layer="q", omega=0.75, magnitude=0.25)
    assert np.isnan(second.magnitude)


def test_a_column_that_may_be_absent_is_nan(tmp_path):
    file = tmp_path / "embedding.csv"
    file.write_text("name,kind,x,y\na,task,1,2\n")
    (point,) = read_records(file, Point)
    assert point[:4] == ("a", "task", 1.0, 2.0) and np.isnan(point.x_share)


def test_half_a_line_at_the_end_is_not_read(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,epoch,name,value\n1,0,train/loss,2.5\n2,0,train/loss,1.2")
    assert read_records(file, Metric) == [Metric(1, "train/loss", 2.5)]


def test_an_absent_file_is_empty_and_a_damaged_one_is_refused(tmp_path):
    file = tmp_path / "gates.csv"
    assert read_records(file, Gate) == []
    file.write_text("step,layer,omega\n1,q,0.5\n")
    with pytest.raises(ValueError, match="has no column 'magnitude'; it has step, layer, omega"):
        read_records(file, Gate)
    file.write_text("step,layer,omega,magnitude\n1,q,much,0.5\n")
    with pytest.raises(ValueError, match=r"line '1,q,much,0.5': could not convert .* record it again"):
        read_records(file, Gate)


def test_of_a_long_history_every_split_keeps_its_last_step(tmp_path):
    run = ToyRun(tmp_path / "run").write()
    records = latest(run.folder / "routing" / "use.csv", Use)
    assert {(record.split, record.step) for record in records} == {("validation", STEPS[-1]), ("test", STEPS[-1])}
    assert {record.split for record in of_best_split(records)} == {"test"}


def test_shares_are_the_weights_of_each_task_and_layer_over_their_sum():
    weights = {"a q x": 3.0, "a q y": 1.0, "a k x": 0.0, "a k y": 0.5, "b q y": 2.0}
    records = [Use(5, "test", *names.split(), weight, 0.0, 7.0) for names, weight in weights.items()]
    found = shares(records)
    assert found is not None and (found.tasks, found.layers, found.experts) == (["a", "b"], ["q", "k"], ["x", "y"])
    nan = float("nan")
    np.testing.assert_allclose(found.values, [[[0.75, 0.25], [0, 1]], [[0, 1], [nan, nan]]])
    np.testing.assert_allclose(found.by_task, [[0.375, 0.625], [0, 1]])


@pytest.mark.parametrize(
    ("layers", "kinds", "blocks"),
    [
        (layers_of(12), ["q_proj", "v_proj", "down_proj"], list(range(12))),
        (["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.query"], ["query"], [0, 1]),
        (["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q",
          "decoder.block.0.layer.1.EncDecAttention.q"],
         ["encoder.layer.0.SelfAttention.q", "decoder.layer.0.SelfAttention.q", "decoder.layer.1.EncDecAttention.q"],
         [0]),
        (["classifier"], ["classifier"], [0]),
    ],
)  # fmt: skip
def test_layers_are_laid_out_by_kind_and_block(layers, kinds, blocks):
    layout = grid(layers)
    assert (layout.kinds, layout.blocks) == (kinds, blocks)
    assert len(set(layout.place.values())) == len(layers)
    table = layout.spread({layer: float(at) for at, layer in enumerate(layers)})
    assert sorted(table[~np.isnan(table)]) == list(range(len(layers)))


def test_an_unfinished_run_takes_the_newest_test_of_a_checkpoint(tmp_path):
    toy = ToyRun(tmp_path / "run").write()
    assert Run(toy.folder).finished
    (toy.folder / "results.json").rename(toy.folder / "results.test-last.json")
    run = Run(toy.folder)
    assert not run.finished and run.results_file is not None and run.results_file.name == "results.test-last.json"


def test_tasks_are_known_from_the_curves_before_there_are_results(tmp_path):
    toy = ToyRun(tmp_path / "run", tasks=["glue/sst2", "b"]).write()
    (toy.folder / "results.json").unlink()
    assert Run(toy.folder).tasks == ["glue/sst2", "b"]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.yaml", None, "has no config.yaml, so it is no run's folder; give what `fit` wrote"),
        ("config.yaml", "services: {web: {}}", "is no configuration of a fit .no model section."),
        ("config.yaml", "a: [", "is no configuration of a fit"),
        ("results.json", "{", "results.json' is damaged; write it again, or delete it"),
        ("results.json", json.dumps({"rows": {}}), "results.json' has no row of the model; test the run again"),
        ("routing/findings.json", "{}", "findings.json' is damaged"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, file, content, expected):
    toy = ToyRun(tmp_path / "run").write()
    if content is None:
        (toy.folder / file).unlink()
    else:
        (toy.folder / file).write_text(content)
    with pytest.raises(ValueError, match=expected) as caught:
        Run(toy.folder)
    assert "\n" not in str(caught.value)
