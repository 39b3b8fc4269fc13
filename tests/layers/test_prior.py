"""The semantic prior: similarity to centroids, restored without any callback."""

import pytest
import torch
from torch.nn import functional

from moe_peft.backbones import CausalLM
from moe_peft.context import RoutingContext
from moe_peft.embedders import HiddenStates, TfIdf
from moe_peft.layers.prior import SemanticPrior

LLAMA = {
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def bound(prior, seed=0):
    torch.manual_seed(seed)
    backbone = CausalLM("tiny", "float32", shape=LLAMA, random_weights=True)
    prior.bind(backbone, backbone.load(), RoutingContext())
    return prior


def make_batch(seed=1, rows=6, width=9, left=True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (rows, width), generator=generator)
    lengths = torch.randint(2, width + 1, (rows, 1), generator=generator)
    places = torch.arange(width)
    mask = places >= width - lengths if left else places < lengths
    words = [
        " ".join(f"w{token}" for token in row[-length:].tolist()) for row, length in zip(ids, lengths, strict=True)
    ]
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "prompt_mask": mask, "text": words}


def fitted(**options):
    prior = bound(SemanticPrior(clusters=5, **options))
    embeddings = prior.embedder.fit([make_batch(seed) for seed in range(4)])
    prior.set_centroids(torch.randn(5, embeddings.shape[1], generator=torch.Generator().manual_seed(3)))
    return prior


def test_the_prior_is_the_raw_dot_product():
    prior, batch = fitted(), make_batch()
    expected = torch.stack([prior.centroids @ embedding for embedding in prior.embedder(batch)])
    torch.testing.assert_close(prior(batch), expected)
    assert prior(batch).dtype == torch.float32 and not prior(batch).requires_grad


def test_cosine_uses_centroids_of_unit_length():
    prior, batch = fitted(norm="cosine"), make_batch()
    expected = functional.cosine_similarity(prior.embedder(batch)[:, None], prior.centroids[None], dim=-1)
    torch.testing.assert_close(prior(batch), expected)


def test_softmax_is_tempered_and_sums_to_one():
    plain, prior, batch = fitted(), fitted(norm="softmax", temperature=0.25), make_batch()
    torch.testing.assert_close(prior(batch), torch.softmax(plain(batch) * 4, -1))


def test_padding_side_and_batch_mates_do_not_enter():
    prior, batch = fitted(), make_batch()
    mask, ids = batch["prompt_mask"], batch["input_ids"]
    right = {"input_ids": torch.zeros_like(ids), "attention_mask": mask.flip(1).long(), "prompt_mask": mask.flip(1)}
    right["input_ids"][mask.flip(1)] = ids[mask]
    assert torch.equal(prior(batch), prior(right))
    for row in range(len(ids)):
        alone = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask", "prompt_mask")}
        torch.testing.assert_close(prior(alone), prior(batch)[row : row + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("embedder", [lambda: None, lambda: HiddenStates(1), lambda: TfIdf(64)])
def test_a_saved_prior_is_restored_to_the_bit_with_no_fitting(embedder):
    prior, fresh = fitted(embedder=embedder()), bound(SemanticPrior(embedder(), clusters=5))
    fresh.load_state_dict(prior.state_dict())
    assert torch.equal(fresh(make_batch(9)), prior(make_batch(9)))


def test_the_state_holds_no_backbone():
    assert set(fitted().state_dict()) == {"centroids", "fitted", "embedder.center", "embedder.fitted"}


def test_an_unfitted_prior_names_the_callback():
    prior = bound(SemanticPrior(clusters=5))
    prior.embedder.fit([make_batch()])
    with pytest.raises(ValueError, match="prior is not fitted: add the SemanticPriorFit callback"):
        prior(make_batch())


def test_binding_again_keeps_the_centroids():
    prior, batch = fitted(), make_batch()
    before = prior(batch)
    assert torch.equal(bound(prior)(batch), before)


def test_autocast_changes_no_bit():
    prior, batch = fitted(), make_batch()
    expected = prior(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior(batch), expected)


def test_centroids_set_under_inference_mode_can_train():
    prior = fitted()
    with torch.inference_mode():
        prior.set_centroids(prior.centroids + 1)
    weight = torch.ones(5, requires_grad=True)
    (prior(make_batch()) * weight).sum().backward()
    assert weight.grad is not None


def test_assign_gives_the_nearest_centroid():
    prior = fitted()
    points = torch.randn(40, 32)
    expected = [int((prior.centroids - point).norm(dim=1).argmin()) for point in points]
    assert prior.assign(points).tolist() == expected


def test_another_number_of_centroids_is_refused():
    with pytest.raises(ValueError, match=r"shape \(6, 32\), this prior's clusters x width is \(5, 32\)"):
        fitted().set_centroids(torch.zeros(6, 32))


def test_a_state_of_other_clusters_is_refused():
    with pytest.raises(RuntimeError, match="centroids"):
        bound(SemanticPrior(clusters=6)).load_state_dict(fitted().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters is 0"),
        ({"norm": "cos"}, "norm is 'cos'"),
        ({"norm": "softmax", "temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": 0.5}, "temperature is 0.5 with norm 'none'"),
    ],
)
def test_bad_arguments_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        SemanticPrior(**options)
    assert "\n" not in str(error.value)


def test_binds_on_the_meta_device():
    backbone = CausalLM("tiny", "float32", shape=LLAMA)
    prior = SemanticPrior(clusters=5)
    with torch.device("meta"):
        prior.bind(backbone, backbone.load(), RoutingContext())
    assert prior.centroids.is_meta and prior.centroids.shape == (5, 32)
