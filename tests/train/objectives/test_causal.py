"""Tests of the causal objective: losses as sums and counts, isolation of documents, parameter names."""

import pytest
import torch

from train.errors import UserError
from train.objectives import build_objective

NAMES = ["gpt_tiny", "llama_tiny"]


def documents(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 257, (size,), generator=generator).tolist() for size in sizes]


def split(batch, micro):
    parts = [value.split(micro) for value in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_causal_loss_is_sum_of_negative_log_likelihoods_and_count(make_config, pack, name):
    objective = build_objective(make_config(name), 257)
    batch = pack([documents([9, 12]), documents([30], seed=1), []], 32)
    total, count = objective(batch)["loss"]
    trained = batch["targets"] != -100
    padded = objective.head(objective.backbone(batch))
    right = -padded.double().log_softmax(-1)[trained].gather(-1, batch["targets"][trained][:, None]).sum()
    assert count.item() == trained.sum() == 8 + 11 + 29
    assert total.item() == pytest.approx(right.item(), rel=1e-6)
    assert objective.logits(batch).shape == (3, 32, 257)


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_gradients_equal_those_of_the_whole_batch(make_config, pack, name):
    ragged = [[3, 5, 2], [30], [2], [15, 16], [], [7, 7, 7], [33], [2, 3]]
    batch = pack([documents(sizes, seed=i) for i, sizes in enumerate(ragged)], 32)
    count = (batch["targets"] != -100).sum()
    gradients = []
    for micro in (8, 4, 1):
        objective = build_objective(make_config(name), 257).double()
        for part in split(batch, micro):
            (objective(part)["loss"][0] / count).backward()
        gradients.append([p.grad for p in objective.parameters()])
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_changed_document_leaves_others_of_its_row_unchanged(make_config, pack, name):
    objective = build_objective(make_config(name), 257).eval()
    first, middle, last = documents([9, 12, 10])
    with torch.no_grad():
        before = objective.logits(pack([[first, middle, last]], 32))
        after = objective.logits(pack([[first, documents([12], seed=7)[0], last]], 32))
        joined = build_objective(make_config(name, isolate=False), 257).eval()
        leaked = [joined.logits(pack([[first, x, last]], 32)) for x in (middle, documents([12], seed=7)[0])]
    assert torch.equal(before[:, :8], after[:, :8])
    assert torch.equal(before[:, 19:], after[:, 19:])
    assert not torch.equal(before[:, 8:19], after[:, 8:19])
    assert not torch.equal(leaked[0][:, 19:28], leaked[1][:, 19:28]), "without isolation a token sees earlier documents"


@pytest.mark.parametrize("name", NAMES)
def test_packed_document_has_the_logits_it_has_alone(make_config, pack, name):
    objective = build_objective(make_config(name), 257).double().eval()
    parts = documents([9, 2, 16])
    with torch.no_grad():
        packed = objective.logits(pack([parts], 32))[0]
        start = 0
        for document in parts:
            size = len(document) - 1
            alone = objective.logits(pack([[document]], size))[0]
            assert torch.allclose(packed[start : start + size], alone, atol=1e-12)
            start += size


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_row_without_targets_gives_zero_finite_gradients(make_config, pack, name, isolate):
    objective = build_objective(make_config(name, isolate=isolate), 257)
    total, count = objective(pack([[], []], 32))["loss"]
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert all(p.grad.eq(0).all() for p in objective.parameters())


def test_parameter_names_of_tied_and_untied_heads(make_config):
    tied, untied = (build_objective(make_config(tied=tied), 257) for tied in (True, False))
    for objective in (tied, untied):
        assert {key.split(".")[0] for key in objective.state_dict()} == {"backbone", "head"}
    assert "head.weight" not in dict(tied.named_parameters())
    assert "head.weight" in dict(untied.named_parameters())
    assert tied.head.weight is tied.backbone.embed.weight


def test_unsupported_objective_is_refused_with_supported_pairs(make_config):
    with pytest.raises(UserError, match=r"seq_len=129 .*max_len=128"):
        build_objective(make_config(seq_len=129, max_len=128), 257)
    with pytest.raises(
        UserError, match=r"causal makes no sense .* encoder.*causal with decoder, recurrent; .*masked with encoder"
    ):
        build_objective(make_config("bert_tiny", objective={"name": "causal"}), 257)


def test_regularisers_change_training_loss_but_not_evaluation_loss(make_config, pack):
    batch = pack([documents([30]), documents([20], seed=1)], 32)
    plain = build_objective(make_config("gpt_tiny"), 257)
    regularised = build_objective(make_config("gpt_tiny", objective={"label_smoothing": 0.1, "z_loss": 0.01}), 257)
    assert torch.equal(plain(batch)["loss"][0], regularised.eval()(batch)["loss"][0])
    total, count = regularised.train()(batch)["loss"]
    trained = batch["targets"] != -100
    logits = plain.head(plain.backbone(batch))[trained].double()
    smooth = torch.nn.functional.cross_entropy(logits, batch["targets"][trained], reduction="sum", label_smoothing=0.1)
    assert total.item() == pytest.approx((smooth + 0.01 * logits.logsumexp(-1).square().sum()).item(), rel=1e-6)
    assert count == trained.sum()
