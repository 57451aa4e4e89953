"""Tests of recurrent networks: isolated documents, state carried from step to step, decoding."""

import pytest
import torch

from train.models.carried_state import CarriedState
from train.objectives import build_objective
from train.optim.factory import parameter_groups

CELLS = ["rnn", "gru", "lstm"]


def build(make_config, cell, **keys):
    return build_objective(make_config(f"{cell}_tiny", **keys), 257)


@pytest.mark.parametrize(("model", "millions"), [("lstm_medium", 20), ("lstm_large", 66)])
def test_recurrent_models_have_published_sizes(make_config, model, millions):
    with torch.device("meta"):
        objective = build_objective(make_config(model), 10_000)
    assert round(sum(p.numel() for p in objective.parameters()) / 1e6) == millions  # Zaremba et al. 2014, section 4.1


@pytest.mark.parametrize("cell", CELLS)
def test_token_changes_the_last_layer_of_an_untrained_model(make_config, cell):
    """If it did not, a model would ignore its input for hundreds of steps: nothing normalises the layers' inputs."""
    backbone = build(make_config, cell).backbone
    with torch.no_grad():
        last, _ = backbone.prefill(torch.arange(256)[:, None], torch.ones(256, dtype=torch.int64), 1)
    assert last.std(0).mean() > 0.01


@pytest.mark.parametrize("cell", CELLS)
def test_packed_documents_have_the_hidden_states_they_have_alone(make_config, pack, cell):
    objective = build(make_config, cell, seq_len=64).double().eval()
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 257, (n,), generator=draw).tolist() for n in (9, 2, 30, 17)]
    rows = pack([documents[:2], documents[2:], []], 64)
    with torch.no_grad():
        packed = objective.logits(rows)
        for row, start, document in ((0, 0, 0), (0, 8, 1), (1, 0, 2), (1, 29, 3)):
            size = len(documents[document]) - 1
            alone = objective.logits(pack([[documents[document]]], size))[0]
            torch.testing.assert_close(packed[row, start : start + size], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_row_continues_previous_state_once_its_step_is_committed(make_config, pack, cell, isolate):
    objective = build(make_config, cell, isolate=isolate).double()
    tokens = torch.randint(0, 257, (65,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = pack([[tokens]], 64)
    halves = [{}, {}]
    for key, value in whole.items():
        halves[0][key], halves[1][key] = value.split(32, dim=1)
    with torch.no_grad():
        right = objective.logits(whole)[0, 32:]
        for number, kept in ((1, False), (3, True)):
            objective({**halves[0], "memory": torch.tensor([-number])})
            objective.backbone.memory.commit(kept)
            logits = objective.logits({**halves[1], "memory": torch.tensor([number])})[0]
            objective.backbone.memory.commit(False)
            assert torch.allclose(logits, right, rtol=0, atol=1e-5) == kept, "memory is float32"
        anew = objective.logits({**halves[1], "memory": torch.tensor([-3])})[0]
    assert not torch.allclose(anew, right, rtol=0, atol=1e-5)
    assert objective.backbone.memory.rows[1:2].eq(0).all()


@pytest.mark.parametrize("cell", CELLS)
def test_state_is_staged_in_training_only_from_the_last_document(make_config, pack, cell):
    objective = build(make_config, cell)
    first, second = [5, 6, 7, 8], [256, 9, 10, 11, 12]
    batch = pack([[first, second]], 7)
    objective.eval()({**batch, "memory": torch.tensor([1])})
    assert not objective.backbone.memory.staged
    objective.train()({**batch, "memory": torch.tensor([1])})
    [(_, staged)] = objective.backbone.memory.staged
    alone = build(make_config, cell)
    alone({**pack([[second]], 4), "memory": torch.tensor([-1])})
    torch.testing.assert_close(staged, alone.backbone.memory.staged[0][1])


def test_carried_state_stays_float32_and_ignores_unnumbered_rows():
    memory = CarriedState(3, 2).to(torch.bfloat16)
    assert memory.rows.dtype == torch.float32
    memory.stage_vectors(torch.tensor([2, 0, -3]), torch.tensor([[1.5, 2], [7, 7], [3, 4]]))
    memory.commit(True)
    assert memory.rows.tolist() == [[0, 0], [1.5, 2], [3, 4]]
    assert memory.read(torch.tensor([2, -2, 0])).tolist() == [[1.5, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize("cell", CELLS)
def test_decoding_by_token_equals_one_pass(make_config, cell):
    objective = build(make_config, cell).eval()
    tokens = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "segments": torch.ones_like(tokens)}
    with torch.no_grad():
        right = objective.logits(batch)
        logits, state = objective.prefill(tokens[:, :6], torch.tensor([3, 5]), 12)
        for step in range(4):
            for row, start in ((0, 3), (1, 5)):
                torch.testing.assert_close(logits[row], right[row, start + step - 1], rtol=0, atol=1e-5)
            token = torch.stack([tokens[0, 3 + step], tokens[1, 5 + step]])
            logits, state = objective.decode(token, state)


@pytest.mark.parametrize(("cell", "gates"), [("rnn", 1), ("gru", 3), ("lstm", 4)])
def test_recurrent_flops_are_six_per_weight(make_config, cell, gates):
    objective = build(make_config, cell)
    weights = sum(p.numel() for name, p in objective.backbone.rnn.named_parameters() if "weight" in name)
    assert objective.backbone.flops_per_token(64) == 6 * weights == 6 * 2 * gates * 2 * 64**2


def test_recurrent_biases_have_no_weight_decay(make_config):
    matrices, rest = parameter_groups(build(make_config, "lstm"), 0.1)
    assert {name.rsplit(".")[-1][:6] for name in matrices["names"]} == {"weight"}
    assert len(matrices["names"]) == 4
    assert "backbone.rnn.bias_hh_l1" in rest["names"]
