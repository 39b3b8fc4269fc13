"""lm-eval's generation: rows of all tasks side by side, stop texts, sampling."""

import pytest
import torch

from moe_peft.data.encoding import Encoder
from moe_peft.data.tasks import TaskSpec
from moe_peft.methods.scoring import generate_text
from tests.interop.tiny_lm_eval import CASES, PROMPTS, Instance, ask, backbones, lm, offline

FIXTURES = (backbones, lm, offline)


@pytest.mark.parametrize(("method", "kind"), [case for case in CASES if case != ("TRex", "seq2seq")])  # all padding
def test_texts_of_mixed_tasks_are_those_of_rows_alone(lm, method, kind):
    model = lm(method, kind, batch_size=8)
    ours = model.module
    names = [spec.name for spec in ours.specs]
    pairs = [(prompt, task) for prompt in PROMPTS for task in range(3)]
    how = {"until": [], "max_gen_toks": 6, "do_sample": False}
    asked = [
        Instance("generate_until", {}, (text, how), 0, (names[task], at, 1)) for at, (text, task) in enumerate(pairs)
    ]
    batches = []
    begin = ours.begin
    ours.begin = lambda batch: batches.append(batch["task_id"].unique().tolist()) or begin(batch)
    found = [text.strip() for text in model.generate_until(asked, disable_tqdm=True)]
    ours.begin = begin
    assert [0, 1, 2] in batches
    alone = []
    for text, task in pairs:
        encoded = Encoder(model.tokenizer, kind, 64).encode(
            TaskSpec("t", "generation", "exact_match", "{text}"), task, [{"id": "0", "text": text}]
        )
        batch = model.collator.prompts(encoded)
        ours.begin(batch)
        alone += generate_text(ours.backbone, ours.model, batch, 6)
    assert found == alone and len(set(found)) > 3


def test_a_text_ends_before_the_first_stop_text(lm):
    model = lm("MoRE")
    how = {"max_gen_toks": 8, "do_sample": False}
    wholes = ask(model, "tone", *((prompt, how | {"until": []}) for prompt in PROMPTS), kind="generate_until")
    words = max((whole.split() for whole in wholes), key=lambda words: len(set(words)))
    at = max(range(len(words) - 2), key=lambda at: words.index(words[at]))
    stop, prompt = f"{words[at]} {words[at + 1]}", PROMPTS[[whole.split() for whole in wholes].index(words)]
    steps = []
    hook = model.module.model.register_forward_hook(lambda *_: steps.append(1))
    (found,) = ask(model, "tone", (prompt, how | {"until": ["never", stop]}), kind="generate_until")
    hook.remove()
    assert found.split() == words[:at] and at > 0 and len(steps) == at + 2 < len(words)


def test_sampling_follows_the_arguments_and_the_seed(lm):
    model = lm("TRex", batch_size=4)
    how = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9, "top_k": 40}

    def sampled(seed):
        torch.manual_seed(seed)
        return ask(model, "tone", *((text, how) for text in PROMPTS[:4]), kind="generate_until")

    assert sampled(1) == sampled(1) != sampled(2)
    cold = ask(model, "tone", (PROMPTS[0], how | {"top_k": 1}), kind="generate_until")
    assert cold == ask(model, "tone", (PROMPTS[0], {"until": [], "max_gen_toks": 8}), kind="generate_until")
