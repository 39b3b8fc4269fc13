import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.sampling import FixedWeights, Uniform
from moe_peft.data.sources import TaskFolder
from tests.data.toys import TOY_WORDS, ToyBackbone, class_rows, word_tokenizer, write_task


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


def row_ids(loader):
    return [batch["row_id"] for batch in loader]


def epoch_ids(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return row_ids(loader)


def test_same_seed_gives_the_same_rows_twice(make_data):
    assert epoch_ids(make_data(), 0) == epoch_ids(make_data(), 0)


def test_another_seed_gives_other_rows(make_data):
    assert epoch_ids(make_data(), 0) != epoch_ids(make_data(seed=1), 0)


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


class Recorder(LightningModule):
    """Records the rows of every step; its one parameter learns nothing of interest."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_index):
        self.seen.append(batch["row_id"])
        return self.weight * batch["input_ids"].float().sum()

    def validation_step(self, batch, batch_index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, path, steps, accumulation=1, **arguments):
    module = Recorder()
    trainer = Trainer(
        default_root_dir=path,
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        callbacks=[ModelCheckpoint(path, "{step}", every_n_train_steps=1, save_top_k=-1)],
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, data, **arguments)
    return module.seen


def test_trainer_gets_new_orders_and_whole_global_batches_under_accumulation(make_data, tmp_path):
    plain = fit(make_data(), tmp_path / "a", 12)
    accumulated = fit(make_data(), tmp_path / "b", 12, accumulation=4)
    assert [sum(accumulated[at : at + 4], []) for at in range(0, 48, 4)] == plain
    assert plain[:6] != plain[6:]


@pytest.mark.parametrize("stop", [1, 4, 6, 8, 12])  # an epoch has 6 steps
def test_run_killed_at_a_step_resumes_with_the_rows_that_were_next(make_data, tmp_path, stop):
    whole = fit(make_data(), tmp_path, 14, accumulation=2)
    after = fit(make_data(), tmp_path, 14, accumulation=2, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert after == whole[2 * stop :]


def test_batch_size_that_does_not_divide_fails_before_training(make_data, tmp_path):
    with pytest.raises(ValueError, match="batch_size=8.*3 accumulation"):
        fit(make_data(), tmp_path, 2, accumulation=3)


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
