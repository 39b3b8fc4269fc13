"""One process, two under DDP and two under FSDP2 do the same: losses, gradients, metrics, checkpoints.

Every strategy is launched once and runs all cases (`distributed_worker`); DDP by Lightning's own launcher, FSDP2 by
torchrun. What counts is the file that each rank leaves, not how its process ends.
"""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.toys import class_rows, write_task
from tests.distributed_worker import BREAKS, CASES, CLIP, RACK, SAVED_AT, Case
from tests.tiny_runs import World, metrics, results, world  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
LAUNCHES = {
    "fsdp of 3": ("fsdp", 3, "causal kept x1 4 steps"),  # slices of unequal size, and empty ones
    "fsdp": ("fsdp", 2, ""),
    "ddp": ("ddp", 2, ""),
    "auto": ("auto", 1, ""),
}
"""Strategy, processes and cases; one process goes last, since it reads checkpoints of the two sharded ones."""
TWO = ["ddp", "fsdp"]
EXACT = [case for case in CASES if case.dtype == "float32"]
RUNS = [(name, case) for name in ("fsdp of 3", *TWO) for case in EXACT if LAUNCHES[name][2] in case.name]


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts Python in a process of its own, with one thread per rank."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | own, stdout=file, stderr=file)


@pytest.fixture(scope="module")
def seen(world: World) -> dict[str, list[dict[str, Any]]]:  # noqa: F811
    """What every rank saw, by launch."""
    few = {"train": class_rows(12), "validation": class_rows(1, start=1000), "test": class_rows(1, start=2000)}
    write_task(world.root / "tasks" / "few", few, "classification", metric="accuracy", name="few")
    found = {}
    for name, (strategy, ranks, wanted) in LAUNCHES.items():
        log = world.root / f"{name}.log"
        by = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if strategy == "fsdp" else []
        files = [world.root / f"{strategy}-{ranks}-{rank}.pt" for rank in range(ranks)]
        start([*by, "tests/distributed_worker.py", strategy, str(world.root), wanted], log).wait(900)
        assert all(file.is_file() for file in files), log.read_text()[-3000:]
        found[name] = [torch.load(file, weights_only=True) for file in files]
    return found


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of two sets of tensors, relative to the norm of the first."""
    assert one.keys() == two.keys()
    size, apart = (
        math.sqrt(sum(values(name).double().square().sum().item() for name in one))
        for values in (lambda name: one[name], lambda name: one[name].double() - two[name].double())
    )
    return apart / size


@pytest.mark.parametrize(("strategy", "case"), RUNS, ids=[f"{name}-{case.name}" for name, case in RUNS])
def test_many_processes_train_as_one(seen, case, strategy):
    one = seen["auto"][0][case.name]
    if one["drawn"]:
        pytest.skip("it draws random numbers for every row, others on every rank")
    assert len(one["losses"]) == case.steps * case.accumulation and len(one["gradients"]) == case.steps
    for two in (rank[case.name] for rank in seen[strategy]):
        torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=1e-5)
        for step, gradients in enumerate(one["gradients"]):
            assert distance(gradients, two["gradients"][step]) < 1e-5, step
            assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        torch.testing.assert_close(two["state"], one["state"], rtol=1e-5, atol=1e-6)
        assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-6)


@pytest.mark.parametrize("case", EXACT, ids=[case.name for case in EXACT])
def test_the_cases_are_hard_ones(seen, case):
    one = seen["auto"][0][case.name]
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in one["gradients"][0].values()))
    own = case.method not in RACK  # whose files decide how far a random adapter moves anything
    assert norm > 2 * CLIP or not own  # clipping bites
    assert one["moved"] > (1e-2 if own else 1e-3) or not any(".factors." in name for name in one["gradients"][0])
    assert {name.split("/")[0] for name in one["metrics"]} >= {"val", "test"}
    if case.kind != "classifier":  # ranks hold unequal numbers of answer tokens
        ranks = zip(*(rank[case.name]["tokens"] for rank in seen["ddp"]), strict=True)
        assert any(first != second for first, second in ranks)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_data_parallel_ranks_end_with_the_same_bits(seen, case):
    first, second = (rank[case.name] for rank in seen["ddp"])
    assert first["state"].keys() == second["state"].keys()
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_parameter_is_cut(seen, case):
    for rank, two in enumerate(found[case.name]["shards"] for found in seen["fsdp"]):
        for name, (shape, own) in two.items():
            size = -(-shape[0] // 2)
            assert own == [min(size, max(0, shape[0] - rank * size)), *shape[1:]], name


def test_no_collective_has_a_name_that_gloo_may_free_twice(seen):
    case = next(case for case in CASES if case.built)
    for called in (rank[case.name]["collectives"] for rank in seen["fsdp"]):
        assert {"c10d::allgather_", "c10d::allreduce_", "c10d::_reduce_scatter_base_"} <= set(called)
        assert not [name for name in called if "coalesced" in name], "see `whole` in moe_peft.sharding"


def test_a_base_in_half_precision_keeps_its_adapters_in_fp32(seen):
    case = next(case for case in CASES if case.dtype == "bfloat16")
    one, two = seen["auto"][0][case.name], seen["fsdp"][0][case.name]
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-3)
    floats = [value for value in two["state"].values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 for value in floats)


@pytest.mark.parametrize("step", SAVED_AT)
@pytest.mark.parametrize("strategy", ["auto", *TWO])
@pytest.mark.parametrize("case", BREAKS, ids=[case.method for case in BREAKS])
def test_a_broken_off_fit_goes_on_to_the_bit(seen, case: Case, strategy, step):
    for rank in seen[strategy]:
        found = rank[f"break off {case.name}"]
        whole, resumed = found["whole"], found[f"from {step}"]
        assert len(resumed["losses"]) == case.steps - step
        assert [loss.item() for loss in resumed["losses"]] == [loss.item() for loss in whole["losses"][step:]]
        assert all(torch.equal(value, resumed["state"][name]) for name, value in whole["state"].items())


@pytest.mark.parametrize("step", SAVED_AT)
@pytest.mark.parametrize("case", BREAKS, ids=[case.method for case in BREAKS])
def test_one_process_goes_on_from_a_sharded_checkpoint(seen, world, case: Case, step):  # noqa: F811
    found = seen["auto"][0][f"break off {case.name}"]
    losses = found[f"from cut {step}"]["losses"]
    torch.testing.assert_close(losses, found["whole"]["losses"][step:], rtol=1e-4, atol=1e-4)
    cut, plain = (
        torch.load(world.root / f"{strategy}-{case.name}-{step}.ckpt", weights_only=True)
        for strategy in ("fsdp", "auto")
    )
    assert cut["state_dict"].keys() == plain["state_dict"].keys()
    torch.testing.assert_close(cut["state_dict"], plain["state_dict"], rtol=1e-3, atol=1e-3)
    assert shapes(cut["optimizer_states"]) == shapes(plain["optimizer_states"])


def shapes(tree: Any) -> Any:
    """Plain containers with tensors replaced by their shapes."""
    if isinstance(tree, dict):
        return {name: shapes(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [shapes(value) for value in tree]
    return list(tree.shape) if isinstance(tree, torch.Tensor) else tree


def test_the_command_line_trains_on_two_nodes_as_it_does_alone(world, tmp_path):  # noqa: F811
    config = world.config(method="TTLoRAMoE", kind="classifier", tasks=("tone", "mood"))
    config["model"]["init_args"]["dropout"] = 0.0
    config["model"]["init_args"]["router"] = {"class_path": "LinearRouter", "init_args": {"noise": False}}
    config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    world.fit(tmp_path / "alone", config)
    file, folder = world.write(tmp_path / "cut.yaml", config), tmp_path / "cut"
    more = ["--config=configs/trainer/fsdp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    fit = ["-m", "moe_peft", "fit", f"--config={file}", *more, f"--trainer.default_root_dir={folder}"]
    by = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--master_port={free_port()}"]
    logs = [tmp_path / f"{node}.log" for node in range(2)]
    nodes = [start([*by, f"--node_rank={at}", *fit, "--trainer.num_nodes=2"], log) for at, log in enumerate(logs)]
    assert [node.wait(300) for node in nodes] == [0, 0], logs[0].read_text()[-3000:]
    for name in ("train/loss", "val/mean"):
        alone, cut = (metrics(tmp_path / run, name) for run in ("alone", "cut"))
        assert [step for step, _ in cut] == [step for step, _ in alone]
        assert [float(value) for _, value in cut] == pytest.approx([float(value) for _, value in alone], rel=1e-5)
    alone, cut = (results(tmp_path / run / "results.json")["rows"] for run in ("alone", "cut"))
    assert cut["model"]["tasks"].keys() == alone["model"]["tasks"].keys()
    assert cut["model"]["mean"] == pytest.approx(alone["model"]["mean"], abs=1e-6)
