"""The loss and its gradients against torchaudio's, and against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchaudio.functional import rnnt_loss

from core.api.errors import NotHereError
from core.api.types import RunContext
from core.testing.cli import run_cli
from core.testing.contexts import hooks_of, lone_context
from timetrial_lean_transducer.loss import LeanLoss
from timetrial_lean_transducer.plugin import LeanTransducer, LeanTransducerConfig

pytestmark = pytest.mark.numbers

Example = tuple[nn.Module, Tensor, Tensor, Tensor, Tensor, Tensor]
"""joint, encoded, predicted, labels, encoded_lengths, label_lengths"""
RTOL = 1e-5


class Joint(nn.Module):
    """What the seam TRANSDUCER_LOSS is given, as the workload has it."""

    def __init__(self, width: int, vocabulary: int, dropout: float) -> None:
        super().__init__()
        self.activation, self.dropout = nn.ReLU(), nn.Dropout(dropout)
        self.output, self.blank = nn.Linear(width, vocabulary), vocabulary - 1

    def forward(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        return self.output(self.dropout(self.activation(encoded[:, :, None] + predicted[:, None])))


def example(
    lengths: list[tuple[int, int]], width: int = 6, vocabulary: int = 9, dropout: float = 0.0,
    dtype: torch.dtype = torch.float32, scale: float = 1.0, padding: int = 0,
) -> Example:  # fmt: skip
    """Utterances of these frames and labels."""
    torch.manual_seed(len(lengths) + width)
    frames, labels = torch.tensor(lengths).T
    joint = Joint(width, vocabulary, dropout).to(dtype)
    joint.output.weight.data *= scale
    encoded = torch.randn(len(lengths), int(frames.max()), width, dtype=dtype, requires_grad=True)
    predicted = torch.randn(len(lengths), int(labels.max()) + 1, width, dtype=dtype, requires_grad=True)
    said = torch.randint(vocabulary - 1, (len(lengths), int(labels.max())))
    said[torch.arange(said.shape[1]) >= labels[:, None]] = padding
    return joint, encoded, predicted, said, frames, labels


def torchaudio_loss(
    joint: Any, encoded: Tensor, predicted: Tensor, said: Tensor, frames: Tensor, labels: Tensor
) -> Tensor:
    logits = joint(encoded, predicted).float()
    return rnnt_loss(logits, said.int(), frames.int(), labels.int(), blank=joint.blank, reduction="none")


def definition(joint: Any, encoded: Tensor, predicted: Tensor, said: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
    """Graves's forward recursion on all logits, differentiated by autograd, in the precision of its inputs."""
    scores = joint(encoded, predicted).log_softmax(3)
    losses: list[Tensor] = []
    for b, (T, U) in enumerate(zip(frames.tolist(), labels.tolist(), strict=True)):
        alpha: dict[tuple[int, int], Tensor] = {(0, 0): scores.new_zeros(())}
        for t in range(T):
            for u in range(U + 1):
                arriving = [alpha[t - 1, u] + scores[b, t - 1, u, joint.blank]] if t else []
                arriving += [alpha[t, u - 1] + scores[b, t, u - 1, said[b, u - 1]]] if u else []
                if arriving:
                    alpha[t, u] = torch.stack(arriving).logsumexp(0)
        losses.append(-alpha[T - 1, U] - scores[b, T - 1, U, joint.blank])
    return torch.stack(losses)


def wanting(made: Example) -> list[Tensor]:
    return [made[1], made[2], *made[0].output.parameters()]


def with_gradients(loss: Callable[..., Tensor], made: Example) -> tuple[Tensor, list[Tensor]]:
    """Losses, and the gradients of their weighted sum, by encoded, predicted, weight and bias."""
    losses = loss(*made)
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
    return losses.detach(), list(torch.autograd.grad(losses @ weights, wanting(made)))


def in_float64(made: Example) -> Example:
    joint = Joint(made[0].output.in_features, made[0].output.out_features, 0.0).double()
    joint.load_state_dict(made[0].state_dict())
    return joint, *(t.detach().double().requires_grad_() for t in made[1:3]), *made[3:]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=4).filter(
    lambda lengths: max(u for _, u in lengths) > 0  # torchaudio wants a label
)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.sampled_from([1, 7, 512]))
def test_loss_and_gradients_are_torchaudios(lengths: list[tuple[int, int]], chunk: int) -> None:
    made = example(lengths, width=16, vocabulary=30)
    losses, gradients = with_gradients(LeanLoss(chunk=chunk, negligible=1e-9), made)
    expected, theirs = with_gradients(torchaudio_loss, made)
    torch.testing.assert_close(losses, expected, rtol=RTOL, atol=0)
    for mine, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=RTOL, atol=RTOL * float(other.abs().max()))


@pytest.mark.parametrize("lengths", [[(1, 0)], [(4, 0), (1, 0)], [(1, 3)], [(5, 4), (3, 4), (5, 0), (1, 1)]])
def test_in_float64_they_are_those_of_the_definition_to_the_last_digits(lengths: list[tuple[int, int]]) -> None:
    made = example(lengths, dtype=torch.float64)
    losses, gradients = with_gradients(LeanLoss(chunk=5), made)
    expected, theirs = with_gradients(definition, made)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_the_function_that_the_forward_pass_computes(dropout: float) -> None:
    made = example([(4, 2), (2, 3)], dropout=dropout, dtype=torch.float64)
    loss = LeanLoss(chunk=7)

    def losses(*_: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same dropout masks for every difference quotient
        return loss(*made)

    assert torch.autograd.gradcheck(losses, wanting(made))


def test_on_long_utterances_gradients_are_those_of_float64_where_torchaudios_are_not() -> None:
    made = example([(300, 60), (250, 50)], width=16, vocabulary=64)
    _, exact = with_gradients(LeanLoss(), in_float64(made))
    _, mine = with_gradients(LeanLoss(negligible=1e-9), made)
    _, theirs = with_gradients(torchaudio_loss, made)
    for found, other, expected in zip(mine, theirs, exact, strict=True):
        assert error(found, expected) < 2e-6 < RTOL < error(other, expected)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.3, 3.0, 20.0]), LENGTHS)
def test_cells_of_negligible_posterior_change_no_gradient(scale: float, lengths: list[tuple[int, int]]) -> None:
    made = example(lengths, width=16, vocabulary=30, scale=scale, dtype=torch.float64)
    losses, gradients = with_gradients(loss := LeanLoss(negligible=1e-9), made)
    expected, exhaustive = with_gradients(LeanLoss(), made)
    assert torch.equal(losses, expected)
    left_out = float(loss.work.left_out)
    assert left_out <= 1e-9 * (loss.work.cells - loss.work.revisited)
    for mine, other in zip(gradients[:2], exhaustive[:2], strict=True):
        # |dz| sums to at most twice the posterior, and the joint's output weighs it.
        assert (mine - other).abs().max() <= 1.5 * 2 * left_out * made[0].output.weight.abs().max() + 1e-14


def test_where_the_alignment_is_sure_most_cells_are_left_out() -> None:
    made = example([(60, 20)], width=16, vocabulary=30, scale=20.0)
    with_gradients(loss := LeanLoss(negligible=1e-9), made)
    assert 0 < loss.work.revisited < 0.5 * loss.work.cells
    assert loss.work.cells == loss.work.padded == 60 * 21


def test_dropout_masks_are_those_of_the_forward_pass_where_whole_chunks_are_left_out() -> None:
    made = example([(60, 20)], width=16, vocabulary=30, scale=20.0, dropout=0.2, dtype=torch.float64)
    found: list[list[Tensor]] = []
    for negligible in (1e-9, 0.0):
        torch.manual_seed(0)
        found.append(with_gradients(LeanLoss(chunk=8, negligible=negligible), made)[1])
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_padding_may_hold_anything_and_is_not_computed() -> None:
    lengths = [(7, 3), (2, 1), (5, 0)]
    expected = with_gradients(LeanLoss(), example(lengths))
    joint, encoded, predicted, *rest = example(lengths, padding=-(10**6))
    with torch.no_grad():
        for b, (frames, labels) in enumerate(lengths):
            encoded[b, frames:] = torch.nan
            predicted[b, labels + 1 :] = torch.inf
    made = joint, encoded, predicted, *rest
    found = with_gradients(loss := LeanLoss(), made)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (loss.work.cells, loss.work.padded) == (7 * 4 + 2 * 2 + 5, 3 * 7 * 4)


def test_the_same_call_gives_the_same_bits_and_with_dropout_another_seed_does_not() -> None:
    made = example([(20, 8), (11, 6)], dropout=0.3)

    def run(seed: int) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(seed)
        return with_gradients(LeanLoss(chunk=32), made)

    torch.testing.assert_close(run(1), run(1), rtol=0, atol=0)
    assert not torch.equal(run(1)[0], run(2)[0])
    made[0].eval()
    assert torch.equal(run(1)[0], run(2)[0])


def test_dropout_keeps_its_share_of_the_hidden_values_and_scales_them() -> None:
    made = example([(1, 0)], dropout=0.25, dtype=torch.float64)
    joint, encoded, predicted, *_ = made
    expected = (encoded + predicted).detach().flatten().relu()
    draws: list[Tensor] = []
    for seed in range(150):
        torch.manual_seed(seed)
        weight, bias = torch.autograd.grad(LeanLoss()(*made).sum(), list(joint.output.parameters()))
        hidden = weight[0] / bias[0]  # of the only cell
        torch.testing.assert_close(hidden, torch.where(hidden != 0, expected / 0.75, 0.0))
        draws.append(hidden != 0)
    kept = torch.stack(draws).double().mean(0)[expected > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 0.75), rtol=0, atol=0.1)


def test_under_autocast_products_are_bfloat16_and_the_softmax_is_not() -> None:
    made = example([(9, 4), (6, 2)], width=32, vocabulary=40)
    exact = with_gradients(torchaudio_loss, made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients = with_gradients(LeanLoss(chunk=16, negligible=1e-9), made)
        expected, theirs = with_gradients(torchaudio_loss, made)
    assert losses.dtype == torch.float32 and not torch.equal(losses, exact[0])
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
    assert [g.dtype for g in gradients] == [torch.float32] * 4
    assert all(error(mine, other) < 0.02 for mine, other in zip(gradients, theirs, strict=True))


def test_bfloat16_inputs_give_a_float32_loss_and_bfloat16_gradients() -> None:
    joint, encoded, predicted, *rest = example([(9, 4), (6, 2)], width=32, vocabulary=40)
    low = [t.detach().bfloat16().requires_grad_() for t in (encoded, predicted)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients = with_gradients(LeanLoss(chunk=16), (joint, *low, *rest))
    expected, theirs = with_gradients(torchaudio_loss, (joint, encoded, predicted, *rest))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=0)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert all(error(mine, other) < 0.03 for mine, other in zip(gradients, theirs, strict=True))


def test_an_impossible_text_has_an_infinite_loss_and_a_nan_is_not_swallowed() -> None:
    made = example([(3, 2), (3, 2)])
    made[3][0] = torch.tensor([2, 2])
    with torch.no_grad():
        made[0].output.bias[2] = -torch.inf
        made[3][1] = torch.tensor([1, 1])
    losses = LeanLoss()(*made)
    assert losses[0] == torch.inf and losses[1].isfinite()
    with torch.no_grad():
        made[0].output.bias[2] = torch.nan
    losses, gradients = with_gradients(LeanLoss(negligible=1e-9), made)
    assert losses.isnan().all() and all(g.isnan().any() for g in gradients)


def test_memory_does_not_grow_with_the_vocabulary_times_the_cells() -> None:
    made = example([(60, 20), (40, 10)], width=8, vocabulary=2000)
    with_gradients(loss := LeanLoss(chunk=32), made)
    assert loss.logits_bytes == 2 * 60 * 21 * 2000 * 4
    gradients = sum(t.nbytes for t in wanting(made))
    chunk = 32 * 2000 * 4
    a_few_numbers_a_cell = 300 * loss.work.cells
    assert loss.work.peak_bytes < 4 * chunk + 2 * gradients + a_few_numbers_a_cell < loss.logits_bytes / 4
    assert loss.work.kept_bytes < 50 * loss.work.cells


def opt(**changes: Any) -> LeanTransducer:
    config = {
        "mode": "exact",
        "chunk": None,
        "negligible": 1e-9,
        "prune_range": 5,
        "simple_scale": 0.5,
        "recursion": "torch",
        **changes,
    }
    return LeanTransducer(LeanTransducerConfig(**config))


def on_rank(model: nn.Module) -> RunContext:
    ctx = lone_context(Path(), "workload=toy")
    ctx.model = model
    return ctx


def replaced(plugin: LeanTransducer) -> LeanLoss:
    """What the opt makes of the workload's default."""
    (replacement,) = plugin.replace(lone_context(Path(), "workload=toy"))
    return replacement.make(torchaudio_loss)


def test_without_a_call_for_training_there_is_no_evidence() -> None:
    plugin = opt()
    assert not plugin.verify().active
    loss, made = replaced(plugin), example([(4, 2)], vocabulary=400)
    with torch.no_grad():
        loss(*made)
    assert not plugin.verify().active
    losses = loss(*made)
    assert not plugin.verify().active
    losses.sum().backward()
    assert plugin.verify().active


def test_the_evidence_counts_calls_cells_and_bytes() -> None:
    plugin = opt(chunk=16)
    loss, made = replaced(plugin), example([(10, 4), (6, 2)], vocabulary=400)
    for _ in range(3):
        with_gradients(loss, made)
    evidence = plugin.verify()
    assert evidence.active and evidence.numerics is None
    padded, cells = 2 * 10 * 5, 10 * 5 + 6 * 3
    assert (evidence.figures["calls"], evidence.figures["padded_cells"]) == (3, 3 * padded)
    assert evidence.figures["cells"] == 3 * cells >= evidence.figures["cells_again"] > 0
    assert evidence.figures["kept_bytes"] < evidence.figures["logits_bytes"] == padded * 400 * 4
    assert evidence.summary.startswith("exact: 3 calls; joint network in 68.0% of 300 cells")


def test_where_nothing_is_saved_there_is_no_evidence() -> None:
    plugin = opt()
    with_gradients(replaced(plugin), example([(3, 1)], vocabulary=3))
    assert not plugin.verify().active


def test_dropout_is_declared_to_change_the_numbers() -> None:
    with_gradients(replaced(plugin := opt()), example([(10, 4)], vocabulary=400, dropout=0.2))
    assert plugin.verify().numerics == "changes"


def test_pruning_gives_the_model_a_simple_joint_and_declares_that_it_changes_the_numbers() -> None:
    made = example([(10, 4)], vocabulary=400)
    model = nn.ModuleDict({"joint": made[0]})
    ctx = on_rank(model)
    for mode, parameters in (("exact", 2), ("pruned", 5)):
        loss = replaced(plugin := opt(mode=mode))
        hooks_of(plugin).prepare_model(ctx=ctx, model=model)
        assert len(list(model.parameters())) == parameters
        with_gradients(loss, made)
        assert plugin.verify().numerics == (None if mode == "exact" else "changes")


def test_a_workload_without_the_seam_is_refused_in_either_mode(tmp_path: Path) -> None:
    for mode in ("exact", "pruned"):
        arguments = ("workload=toy", "+opt=lean_transducer", f"opt.lean_transducer.mode={mode}")
        refused = run_cli(*arguments, run_dir=tmp_path / mode).expect(2)
        assert "acts on rnnt.loss, which nothing here offers: not workload 'toy'" in refused.stderr


def test_the_triton_kernel_is_refused_where_there_is_no_gpu() -> None:
    with pytest.raises(NotHereError, match="recursion=triton needs a GPU"):
        replaced(opt(recursion="triton"))
