import json

import pytest
import torch

from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.sampling import FixedWeights, Uniform
from moe_peft.data.sources import TaskFolder
from tests.data.toys import TOY_WORDS, ToyBackbone, class_rows, word_tokenizer, write_task


def row_ids(loader):
    return [batch["row_id"] for batch in loader]


def epoch_ids(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return row_ids(loader)


def test_same_seed_gives_the_same_rows_twice(make_data):
    assert epoch_ids(make_data(), 0) == epoch_ids(make_data(), 0)


def test_another_seed_gives_other_rows(make_data):
    assert epoch_ids(make_data(seed=0), 0) != epoch_ids(make_data(seed=1), 0)


def test_epoch_two_draws_another_order(make_data):
    data = make_data()
    assert epoch_ids(data, 0) != epoch_ids(data, 1)


def test_workers_change_nothing(make_data):
    alone = list(make_data().train_dataloader())
    helped = list(make_data(num_workers=2).train_dataloader())
    assert len(alone) == len(helped) == 6
    for one, other in zip(alone, helped, strict=True):
        assert one["row_id"] == other["row_id"] and torch.equal(one["input_ids"], other["input_ids"])


def test_loaders_leave_the_global_random_state_alone(make_data):
    data = make_data()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    row_ids(data.train_dataloader()), row_ids(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_one_epoch_holds_every_training_row(make_data):
    names = {name for batch in epoch_ids(make_data(), 0) for name in batch}
    assert names == {f"films/{i}" for i in range(30)} | {f"next/{i}" for i in range(11)}


def test_task_id_is_the_place_in_the_list(make_data):
    for batch in make_data().train_dataloader():
        assert [int(name.startswith("next")) for name in batch["row_id"]] == batch["task_id"].tolist()


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_only_the_answer_and_its_end_token_enter_the_loss(make_data, kind):
    data = make_data(kind)
    tokenizer = data.backbone.tokenizer()
    rows = {row.row_id: row for row in data.rows("train")}
    for batch in data.train_dataloader():
        for name, ids, mask, labels in zip(
            batch["row_id"], batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            kept = labels[labels != -100]
            assert tokenizer.decode(kept) == f"{rows[name].row['target']} </s>"
            prompt = ids[(mask == 1) & (labels == -100)] if kind == "causal" else ids[mask == 1]
            assert tokenizer.decode(prompt) == rows[name].text
        assert sum(batch["labels"].ne(-100).sum(1)) / batch["tokens_share"] == 1  # one rank, no accumulation


def test_test_loader_has_every_row_once_in_single_task_batches(make_data):
    batches = list(make_data(eval_batch_size=6).test_dataloader())
    assert sorted(f"{len(row['choices'])}-{row['id']}" for batch in batches for row in batch["rows"]) == sorted(
        [f"2-{i}" for i in range(2000, 2007)] + [f"3-{i}" for i in range(2000, 2007)]
    )
    assert all(len(batch["task_id"].unique()) == 1 for batch in batches)
    assert all(sum(len(row["choices"]) for row in batch["rows"]) <= 6 for batch in batches)


def test_specs_are_known_without_rows_or_tokenizer(make_task):
    class Forbidden(ToyBackbone):
        def tokenizer(self):
            raise AssertionError("read too early")

    data = MultitaskDataModule([str(make_task("films"))], Forbidden())
    assert [spec.name for spec in data.specs] == ["films"]


def test_two_tasks_of_one_name_are_refused(make_task):
    path = str(make_task("films"))
    with pytest.raises(ValueError, match="2 tasks called 'films'"):
        _ = MultitaskDataModule([path, path], ToyBackbone()).specs


@pytest.mark.parametrize("name", ["mean", "router"])
def test_a_name_that_tables_and_metrics_need_is_refused(make_task, name):
    with pytest.raises(ValueError, match=f"^tasks holds a task called '{name}', which stands for .*; rename it"):
        _ = MultitaskDataModule([str(make_task(name))], ToyBackbone()).specs


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [({"tasks": []}, "tasks=\\[\\]"), ({"batch_size": 0}, "batch_size=0"), ({"seed": -1}, "seed=-1")],
)
def test_bad_argument_is_refused(make_task, arguments, telling):
    with pytest.raises(ValueError, match=telling):
        MultitaskDataModule(**{"tasks": [str(make_task("films"))], "backbone": ToyBackbone(), **arguments})


def test_setup_finds_a_rule_that_does_not_fit_before_training(make_data):
    with pytest.raises(ValueError, match="films, next"):
        make_data(sampling=FixedWeights({"films": 1.0})).setup("fit")


def test_setup_finds_an_answer_that_is_too_long_before_training(make_data):
    with pytest.raises(ValueError, match="'films': 30 rows have an answer"):
        make_data(max_length=2).setup("fit")


def test_majority_is_the_commonest_training_label(tmp_path):
    rows = class_rows(9)  # labels 0 1 0 1 0 1 0 1 0
    folder = write_task(tmp_path / "films", {"train": rows, "validation": class_rows(2), "test": class_rows(4)})
    data = MultitaskDataModule([str(folder)], ToyBackbone())
    assert data.majority("films") == 0
    with pytest.raises(ValueError, match="task 'movies' is unknown; use one of films"):
        data.majority("movies")


def test_majority_of_numbers_is_none(tmp_path):
    rows = [{"id": "1", "text": "film", "value": 1.0}]
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    folder = write_task(tmp_path / "sts", splits, "regression", metric="pearson")
    assert MultitaskDataModule([str(folder)], ToyBackbone()).majority("sts") is None


def test_sampled_prompts_are_stratified_training_prompts_without_answers(make_data):
    batches = make_data(eval_batch_size=8).sample_prompts(16, seed=0)
    names = [name for batch in batches for name in batch["row_id"]]
    assert len(set(names)) == 16 and sum(name.startswith("films/") for name in names) == 8
    assert all("labels" not in batch and len(batch["row_id"]) <= 8 for batch in batches)


def test_sampled_prompts_fill_up_from_the_larger_task(make_data):
    names = [name for batch in make_data().sample_prompts(36, seed=0) for name in batch["row_id"]]
    assert sum(name.startswith("next/") for name in names) == 11 and len(set(names)) == 36


def test_sampled_prompts_are_all_rows_where_fewer_exist_and_follow_the_seed(make_data):
    data = make_data()
    assert sum(len(batch["row_id"]) for batch in data.sample_prompts(2000, seed=0)) == 41
    assert (
        row_ids(data.sample_prompts(10, 0))
        == row_ids(data.sample_prompts(10, 0))
        != row_ids(data.sample_prompts(10, 1))
    )


def test_cache_key_follows_everything_the_model_is_shown(make_data, make_task):
    key = make_data().cache_key("test")
    assert key == make_data(batch_size=4, seed=5, sampling=Uniform()).cache_key("test")
    others = [
        make_data().cache_key("validation"),
        make_data("seq2seq").cache_key("test"),
        make_data(bos="always").cache_key("test"),
        MultitaskDataModule([TaskFolder(str(make_task("films")), template="{text} good :")], ToyBackbone()).cache_key(
            "test"
        ),
        MultitaskDataModule([TaskFolder(str(make_task("films")))], ToyBackbone()).cache_key("test"),
    ]
    assert len({key, *others}) == 6


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_setup_finds_a_missing_split_before_training(make_task, split):
    folder = make_task("films")
    (folder / f"{split}.jsonl").unlink()
    with pytest.raises(ValueError, match=f"has no {split}.jsonl"):
        MultitaskDataModule([str(folder)], ToyBackbone()).setup("fit")


def test_task_names_and_folder_sources_are_found_under_the_root(make_task, tmp_path):
    make_task("films", train=8), make_task("next", train=9, kind="multiple_choice")
    data = MultitaskDataModule(["films", TaskFolder("next", train_rows=2)], ToyBackbone(), root=str(tmp_path))
    assert [spec.name for spec in data.specs] == ["films", "next"]
    assert len(data.rows("train")) == 8 + 2


def test_a_folder_that_is_not_under_the_root_is_one_clear_line(make_task, tmp_path):
    make_task("films")
    for root, path in ((str(tmp_path), tmp_path / "filmes"), (None, "filmes")):
        with pytest.raises(ValueError) as error:
            _ = MultitaskDataModule(["filmes"], ToyBackbone(), root=root).specs
        assert f"task folder '{path}' does not exist" in str(error.value) and "data.root" in str(error.value)
        assert "\n" not in str(error.value)


def outside(make_task, tmp_path, tasks, **arguments):
    """A classifier's or a causal model's data on one task, with others as outside."""
    make_task("films")
    kind = arguments.pop("kind", "causal")
    return MultitaskDataModule(["films"], ToyBackbone(kind), root=str(tmp_path), outside=tasks, **arguments)


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])
def test_prompts_of_outside_tasks_are_test_prompts_of_no_task_without_answers(make_task, tmp_path, kind):
    twice = {"id": "0", "text": "after 7", "choices": ["8", "8"], "label": 0}
    (make_task("next", kind="multiple_choice") / "test.jsonl").open("a").write(json.dumps(twice))
    numbers = dict.fromkeys(("train", "validation", "test"), [{"id": "1", "text": "film 7 was", "value": 2.5}])
    write_task(tmp_path / "stars", numbers, "regression", metric="pearson")
    words = dict.fromkeys(("train", "validation", "test"), [{"id": "1", "text": "after 7", "target": "good " * 40}])
    write_task(tmp_path / "tale", words, "generation", metric="exact_match")
    data = outside(
        make_task, tmp_path, ["next", TaskFolder("stars"), "tale"], kind=kind, max_length=8, eval_batch_size=4
    )
    data.setup("test")
    found = {name: data.prompts(rows) for name, rows in data.outside_rows.items()}
    assert {name: [len(batch["row_id"]) for batch in own] for name, own in found.items()} == {
        "next": [4, 3], "stars": [1], "tale": [1]
    }  # fmt: skip
    for batch in (batch for own in found.values() for batch in own):
        assert "labels" not in batch and "target" not in batch and set(batch["task_id"].tolist()) == {-1}
        for text, ids, mask in zip(batch["text"], batch["input_ids"], batch["attention_mask"], strict=True):
            assert data.backbone.tokenizer().decode(ids[mask == 1]) == text
    assert found["stars"][0]["text"] == ["film 7 was :"] and len(data.specs) == 1


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_an_outside_task_of_the_name_of_another_is_refused(make_task, tmp_path, stage):
    with pytest.raises(ValueError, match="^tasks and outside hold 2 tasks called 'films'; names must be unique"):
        outside(make_task, tmp_path, ["films"]).setup(stage)


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_a_command_that_reads_no_outside_tasks_does_not_ask_for_them(make_task, tmp_path, stage):
    outside(make_task, tmp_path, ["gone"]).setup(stage)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_setup_finds_an_outside_task_without_test_rows(make_task, tmp_path, stage):
    (make_task("next") / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="next' has no test.jsonl"):
        outside(make_task, tmp_path, ["next"]).setup(stage)


def test_steps_of_numbers_reach_the_encoder(tmp_path):
    splits = dict.fromkeys(("train", "validation", "test"), [{"id": "1", "text": "film", "value": 2.53}])
    folder = write_task(tmp_path / "sts", splits, "regression", metric="pearson")
    tokenizer = word_tokenizer(TOY_WORDS + " 2.6")
    data = MultitaskDataModule([str(folder)], ToyBackbone("seq2seq", tokenizer), number_steps=5)
    assert tokenizer.decode(data.rows("train")[0].answer) == "2.6 </s>"


def test_seed_is_the_runs_own_where_none_is_given(make_data, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    unset = epoch_ids(make_data(), 0)
    data = make_data()
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    assert epoch_ids(data, 0) == epoch_ids(make_data(seed=9), 0) != unset
    assert unset == epoch_ids(make_data(seed=0), 0)


def test_an_explicit_seed_wins_over_the_runs_own(make_data, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    assert epoch_ids(make_data(seed=4), 0) != epoch_ids(make_data(), 0)
    assert make_data(seed=4).seed == 4


@pytest.mark.parametrize("packs", [True, False])
def test_the_backbone_decides_whether_options_are_packed(make_task, packs):
    class Choosy(ToyBackbone):
        def packs_options(self, max_length):
            return packs and max_length == 99

    data = MultitaskDataModule([str(make_task("films"))], Choosy(), max_length=99)
    batch = next(iter(data.test_dataloader()))
    assert ("option_of" in batch) == packs
    assert len(batch["input_ids"]) == len(batch["rows"]) * (1 if packs else 2)


def test_chat_style_reaches_the_encoder(make_task):
    chat = "{% for m in messages %}film {{ m['content'] }} {% endfor %}was "
    backbone = ToyBackbone(tokenizer=word_tokenizer(TOY_WORDS, chat_template=chat))
    data = MultitaskDataModule([str(make_task("films", train=4))], backbone, style="chat")
    assert backbone.tokenizer().decode(data.rows("train")[0].prompt) == "film film 0 was bad : was"


def test_smollm2_batches_of_real_tasks_decode_to_prompt_and_answer(data_root, smollm2_tokenizer):
    tasks = [
        TaskFolder(str(data_root / name), train_rows=20, equal_options="drop") for name in ("sst2", "siqa", "piqa")
    ]
    data = MultitaskDataModule(tasks, ToyBackbone(tokenizer=smollm2_tokenizer), batch_size=15)
    rows = {row.row_id: row.row for row in data.rows("train")}
    specs = {spec.name: spec for spec in data.specs}
    for batch in data.train_dataloader():
        for name, ids, labels, mask in zip(
            batch["row_id"], batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        ):
            template = specs[name.split("/")[0]].template
            prompt = smollm2_tokenizer.decode(ids[(labels == -100) & (mask == 1)])
            assert template.format_map(rows[name]).endswith(prompt)
            assert smollm2_tokenizer.decode(labels[labels != -100]) == f" {rows[name]['target']}<|im_end|>"
