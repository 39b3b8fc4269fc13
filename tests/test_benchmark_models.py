"""The benchmark of whole models, and the tool: what it writes, and what it says to a mistake."""

import csv
import json

import pytest
import torch

from moe_peft.backbones import CausalLM
from moe_peft.benchmark import decoding, models, steps, suite
from moe_peft.benchmark.models import METHODS, OWN, PEFT, XLORA
from moe_peft.layers.adapted import AdaptedLinear
from tests.tiny import LLAMA

TINY = ["--widths", 24, "--dtypes", "fp32", "--rows", 2, "--tokens", 4, "--rounds", 2]


def backbone():
    return CausalLM("tiny", dtype="float32", shape=LLAMA, random_weights=True)


def test_a_step_of_every_method_is_timed():
    rows = steps.step_section(backbone(), rows=8, tokens=8, rounds=2, device="cpu")
    assert [row["variant"] for row in rows] == [steps.FROZEN, *METHODS, PEFT, XLORA]
    parameters = {row["variant"]: row["parameters"] for row in rows}
    assert parameters[PEFT] == parameters[OWN] and parameters[steps.FROZEN] == 0
    assert all(0 < row["min_us"] <= row["median_us"] and row["ratio_to"][PEFT].median > 0 for row in rows)


def test_a_step_changes_what_is_trained_and_nothing_else():
    batch = models.random_batch(LLAMA["vocab_size"], 8, 8, "cpu")
    model = backbone().load()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    shared = models.sharing(backbone(), model)
    assert all(one is other for one, other in zip(shared.load().parameters(), model.parameters(), strict=True))
    with steps.contestants(shared, batch) as everyone:
        for one in everyone[1:]:
            old = {name: weight.detach().clone() for name, weight in one.trained.items()}
            one.step(torch.optim.AdamW(one.trained.values(), lr=steps.RATE))
            assert old and all(not torch.equal(weight, old[name]) for name, weight in one.trained.items()), one.name
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("section", [steps.step_section, decoding.decoding_section])
def test_dead_adapters_are_refused(section, monkeypatch):
    monkeypatch.setattr(models, "NOISE", 0.0)
    with pytest.raises(RuntimeError, match="LoRA r=8: .* (has no gradient|do not move the logits)"):
        section(backbone(), 4, 8, 1, "cpu")


@pytest.mark.parametrize("section", [steps.step_section, decoding.decoding_section])
def test_another_lora_than_pefts_is_refused(section, monkeypatch):
    arguments = METHODS[OWN][1]
    monkeypatch.setitem(arguments, "alpha", 1.0 * arguments["alpha"] / 2)
    with pytest.raises(RuntimeError, match="differ"):
        section(backbone(), 4, 8, 1, "cpu")


def test_a_decoded_token_of_every_method_is_timed():
    rows = decoding.decoding_section(backbone(), rows=8, tokens=6, rounds=2, device="cpu")
    names = [decoding.BARE, decoding.EAGER, *METHODS, decoding.MERGED, PEFT]
    assert [row["variant"] for row in rows] == names
    assert all(0 < row["min_us"] <= row["median_us"] for row in rows)


def test_every_call_decodes_the_same_tokens_after_the_same_prompt():
    batch = models.random_batch(LLAMA["vocab_size"], 4, 8, "cpu")
    with torch.no_grad():
        [one] = [one for one in decoding.decoders(backbone(), batch) if one.name == "T-REX 4x8"]
        cache, last = one.prefill(batch["input_ids"]), batch["input_ids"][:, :1]
        first, second = one.decode(cache, last), one.decode(cache, last)
    assert len(first) == decoding.TOKENS and cache.get_seq_length() == 8
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_method_that_decodes_otherwise_than_it_reads_is_refused(monkeypatch):
    forward = AdaptedLinear.forward
    monkeypatch.setattr(AdaptedLinear, "forward", lambda self, x: self.base(x) if x.shape[1] == 1 else forward(self, x))
    with pytest.raises(RuntimeError, match="^LoRA r=8: logits differ"):
        decoding.decoding_section(backbone(), rows=8, tokens=6, rounds=1, device="cpu")


def test_the_tool_prints_and_writes_what_it_found(run_tool, tmp_path):
    sections = "adapter,growth"
    status, out, errors = run_tool("bench", *TINY, "--sections", sections, "--out", tmp_path / "found")
    assert status == 0 and not errors
    assert sum("T-REX 4x8 / eager LoRA r=22" in line for line in out) == 1
    assert any("FLOPs equal the closed formula" in line and "yes" in line for line in out)
    folder = tmp_path / "found"
    assert (folder / "results.png").read_bytes()[1:4] == b"PNG"
    written = json.loads((folder / "results.json").read_text())
    assert written["settings"]["rounds"] == 2 and {"adapter", "growth"} < written.keys()
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(written["adapter"]) + len(written["growth"])
    trex = [row for row in rows if row["variant"] == suite.TREX]
    assert len(trex) == 4 and all(float(row["min_us"]) <= float(row["median_us"]) for row in trex)
    with (folder / "targets.csv").open() as file:
        targets = {row["row"]: row for row in csv.DictReader(file)}
    assert targets["T-REX 4x8 / eager LoRA r=22"]["target"] == "1.25" and len(targets) == 10


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "out: give a folder for the results"),
        (["--out", "x", "--sections", "adapter,x"], "sections: 'x' is unknown; use adapter, growth, step, decoding"),
        (["--out", "x", "--widths", "0"], "width: 0 is below 1"),
        (["--out", "x", "--widths", "a"], "argument --widths: invalid numbers value: 'a'"),
        (["--out", "x", "--rows", "-1"], "rows: -1 is below 1"),
        (["--out", "x", "--rounds", "0"], "rounds: 0 is below 1"),
        (["--out", "x", "--dtypes", "fp8"], "dtype: 'fp8' is unknown; use fp32, bf16"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["--out", __file__], f"out: '{__file__}' is a file; give a folder"),
        (["--figures", "nowhere/x.csv"], "figures: the folder of 'nowhere/x.csv' does not exist; make it first"),
        (["--out", "x", "--backbone", "no.yaml"], "backbone: there is no file 'no.yaml'"),
        (
            ["--out", "x", "--backbone", "configs/methods/lora.yaml"],
            "backbone: 'configs/methods/lora.yaml' has no model.init_args.back",
        ),
        (
            ["--out", "x", "--backbone", "configs/bases/t5-base.yaml"],
            "backbone: 'configs/bases/t5-base.yaml' is a seq2",
        ),
    ],
)
def test_a_mistake_is_one_readable_line(run_tool, given, expected):
    status, out, errors = run_tool("bench", *given)
    assert status == 2 and not out and len(errors) == 1 and errors[0].startswith(f"error: {expected}")
