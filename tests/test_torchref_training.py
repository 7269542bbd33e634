"""The reference's training against what is known without it: transformers' loss, AdamW written out, schedules."""

import copy
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import torchref
from jaxgpt import optimizer
from jaxgpt.settings import TrainSettings
from torchref import training

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "gpt2": transformers.GPT2Config(
        vocab_size=31, n_embd=12, n_inner=20, n_layer=2, n_head=3, n_positions=24, attn_pdrop=0, embd_pdrop=0
    ),
    "llama": transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=18,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=24,
    ),
}
NARROW = {"gpt2": 1e-9, "llama": 1e-5}
"""transformers' Llama computes norms, RoPE and softmax in float32 even in a float64 model."""


def episodes() -> list[training.Episode]:
    rng = np.random.default_rng(3)
    made: list[training.Episode] = []
    for length, begins in ((9, 4), (6, 1), (12, 10), (5, 2), (8, 3)):
        made.append((rng.integers(0, 31, length).tolist(), [int(place >= begins) for place in range(length)]))
    return made


# -- Rows ------------------------------------------------------------------------------


def test_windows_cut_the_stream_and_no_document_predicts_the_next():
    first, second = training.windows([[11, 12, 13], [21, 22, 23, 24]], 4)
    assert first == training.Row([11, 12, 13, 21], [12, 13, 0, 22], [1, 1, 0, 1], [0, 1, 2, 0], [1, 1, 1, 2])
    # A document that goes on begins again: its past is not in this row.
    assert second == training.Row([22, 23, 24], [23, 24, 0], [1, 1, 0], [0, 1, 2], [1, 1, 1])


@pytest.mark.parametrize("length", [1, 2, 5, 7, 16])
def test_every_token_but_the_first_of_a_document_is_a_target_exactly_once(length: int):
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
    rows = training.windows(documents, length)
    targets = [t for row in rows for t, counts in zip(row.targets, row.mask, strict=True) if counts]
    assert targets == [2, 3, 6, 7, 8, 9, 10, 12]


def test_episodes_take_the_first_row_with_room_and_train_their_flagged_tokens():
    rows = training.packed([([1, 2, 3, 4], [0, 0, 1, 1]), ([5, 6, 7], [1, 1, 0]), ([8, 9], [0, 1])], 4)
    assert rows[0] == training.Row([1, 2, 3, 8], [0, 3, 4, 9], [0, 1, 1, 1], [0, 1, 2, 0], [1, 1, 1, 2])
    assert rows[1] == training.Row([5, 6], [6, 0], [1, 0], [0, 1], [1, 1])


def test_the_last_batch_is_filled_with_rows_of_padding():
    batch = training.batches(training.packed([([1, 2, 3], [1, 1, 1])], 4), 4, 2)[0]
    assert batch.ids.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.trained == 2


# -- Loss and gradients ----------------------------------------------------------------


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    torch.manual_seed(5)
    config = CONFIGS[request.param]
    stock = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    folder: Path = tmp_path_factory.mktemp(request.param)
    stock.save_pretrained(folder)
    return stock.double(), torchref.load(folder, torch.float32).double(), NARROW[request.param]


def unpacked_loss(stock: transformers.PreTrainedModel) -> torch.Tensor:
    """Every episode alone, through transformers: summed losses of flagged tokens, divided once."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, flags in episodes():
        logits = stock(torch.tensor([ids])).logits[0, :-1]
        labels = torch.tensor([i if flag else -100 for i, flag in zip(ids[1:], flags[1:], strict=True)])
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels >= 0).sum())
    return total / count


def test_packed_micro_batches_have_the_loss_and_gradients_of_transformers_on_single_episodes(pair):
    stock, ours, narrow = pair
    mean = unpacked_loss(stock)
    mean.backward()
    expected = float(mean.detach())
    true = {name: parameter.grad for name, parameter in stock.named_parameters()}
    stock.zero_grad()
    micro_batches = training.batches(training.packed(episodes(), 14), 14, 1)
    assert len({batch.trained for batch in micro_batches}) > 1, "micro-batches are alike"
    loss, found = training.gradients(ours, micro_batches)
    assert loss == pytest.approx(expected, rel=narrow)
    assert found.keys() == true.keys()
    scale = training.global_norm(found)
    for name, gradient in found.items():
        assert float((gradient - true[name]).norm()) < narrow * scale, name
    means = np.mean([training.gradients(ours, [batch])[0] for batch in micro_batches])
    assert abs(means - expected) > 1e-3, "the mean of means would have passed as well"


def test_gradients_one_by_one_are_the_same_in_the_order_of_backpropagation(pair):
    _, ours, _ = pair
    (batch,) = training.batches(training.packed(episodes()[:2], 14), 14, 1)
    loss, expected = training.gradients(ours, [batch])
    taken: dict[str, torch.Tensor] = {}
    assert training.gradients_one_by_one(ours, batch, taken.__setitem__) == pytest.approx(loss, rel=1e-12)
    assert taken.keys() == expected.keys()
    assert all(torch.allclose(taken[name], expected[name], rtol=1e-10, atol=1e-14) for name in taken)
    assert all(parameter.grad is None for parameter in ours.parameters())
    layers = [match.group() for name in taken if (match := re.search(r"\d+", name))]
    assert layers == sorted(layers, reverse=True)


# -- Optimizer -------------------------------------------------------------------------

RECIPE = training.Recipe(
    steps=6,
    learning_rate=0.1,
    schedule="cosine",
    warmup_steps=2,
    decay_fraction=0.5,
    final_learning_rate=0.2,
    weight_decay=0.3,
    beta1=0.8,
    beta2=0.9,
    clip_norm=0.5,
)


def test_the_trainer_steps_as_torch_does_bit_for_bit(pair):
    _, ours, _ = pair
    theirs = copy.deepcopy(ours)
    matrices, vectors = ([p for p in theirs.parameters() if (p.dim() > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": RECIPE.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    stock = torch.optim.AdamW(groups, betas=(RECIPE.beta1, RECIPE.beta2), eps=RECIPE.epsilon)
    trainer = training.Trainer(copy.deepcopy(ours), RECIPE)
    micro_batches = training.batches(training.packed(episodes(), 14), 14, 1)
    for step in range(4):
        _, found = training.gradients(theirs, micro_batches)
        limited = training.clipped(found, training.global_norm(found), RECIPE.clip_norm)
        for name, parameter in theirs.named_parameters():
            parameter.grad = limited[name]
        for group in stock.param_groups:
            group["lr"] = training.learning_rate(RECIPE, step)
        stock.step()
        trainer.step(micro_batches)
        for (name, parameter), stepped in zip(theirs.named_parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(parameter, stepped), (step, name)


def test_the_trainer_is_adamw_written_out(pair):
    _, ours, _ = pair
    state = ours.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    micro_batches = training.batches(training.packed(episodes(), 14), 14, 1)
    trainer = training.Trainer(ours, RECIPE)
    m = {name: 0.0 for name, _ in ours.named_parameters()}
    v = dict(m)
    for step in range(1, 5):
        theta = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
        _, found = training.gradients(ours, micro_batches)
        norm = math.sqrt(sum(float((g**2).sum()) for g in found.values()))
        report = trainer.step(micro_batches)
        assert (report.grad_norm, report.learning_rate) == (
            pytest.approx(norm),
            training.learning_rate(RECIPE, step - 1),
        )
        for name, parameter in ours.named_parameters():
            gradient = found[name] * min(1.0, 0.5 / norm)
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.9 * v[name] + 0.1 * gradient**2
            divisor = (v[name] / (1 - 0.9**step)).sqrt() + 1e-8
            decay = 0.3 * theta[name] if parameter.dim() > 1 else 0.0
            expected = theta[name] - report.learning_rate * (m[name] / (1 - 0.8**step) / divisor + decay)
            assert torch.allclose(parameter, expected, rtol=1e-9, atol=1e-12), name
            assert torch.allclose(trainer.divisors()[name], divisor, rtol=1e-9), name
    ours.load_state_dict(before)


def test_a_gradient_is_clipped_to_exactly_the_norm_and_a_short_one_is_left():
    gradients = {"a": torch.tensor([3.0], dtype=torch.float64), "b": torch.tensor([[4.0]], dtype=torch.float64)}
    assert training.global_norm(training.clipped(gradients, 5.0, 0.001)) == pytest.approx(0.001, rel=1e-12)
    assert torch.equal(training.clipped(gradients, 5.0, 6.0)["b"], gradients["b"])


def test_the_rate_rises_stays_and_falls_as_it_should():
    rates = [training.learning_rate(RECIPE, step) for step in range(6)]
    assert rates[:3] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])
    assert rates[-1] == pytest.approx(0.02)
    assert rates[3] == pytest.approx(0.02 + 0.08 * 0.75), "a third of the way down a cosine"


def test_both_schedules_are_the_same_function_for_every_setting():
    settings = itertools.product(("cosine", "wsd", "constant"), (1, 9), (0, 5, 30), (0.0, 0.4), (0.0, 0.1))
    for kind, steps, warmup, fraction, final in settings:
        told = TrainSettings(
            steps=steps, schedule=kind, warmup_steps=warmup, decay_fraction=fraction, final_learning_rate=final
        )
        names = vars(RECIPE).keys() - {"epsilon"}
        recipe = training.Recipe(**{name: getattr(told, name) for name in names})
        ours = [training.learning_rate(recipe, step) for step in range(steps)]
        theirs = np.asarray(optimizer.schedule(told)(np.arange(steps)))
        assert ours == pytest.approx(theirs.tolist(), rel=1e-5, abs=1e-9), told
