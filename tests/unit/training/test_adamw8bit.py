"""AdamW with 8-bit moments: what rounding costs is bounded and right on average, and training goes as with AdamW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qingtune.kernels.native import elementwise as in_c
from qingtune.training import adamw8bit
from qingtune.training.adamw8bit import (
    BLOCK,
    AdamW8bit,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    round_to_bf16,
)
from qingtune.training.checkpoint import load_checkpoint, save_checkpoint
from qingtune.training.loop import Progress

Coded = tuple[torch.Tensor, torch.Tensor]
Named = dict[str, torch.nn.Parameter]
SIZES = [(1,), (255,), (256,), (257,), (3, 700), (40, 64)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def first_code(moment: torch.Tensor, noise: torch.Tensor) -> Coded:
    code, largest = torch.empty(moment.shape, dtype=torch.int8), torch.empty(len(moment), 1)
    encode_first(moment, code, largest, noise)
    return code, largest


def second_code(moment: torch.Tensor, noise: torch.Tensor) -> Coded:
    code, largest = torch.empty(moment.shape, dtype=torch.uint8), torch.empty(len(moment), 1)
    encode_second(moment, code, largest, noise)
    return code, largest


def wide_range(seed: int = 0) -> torch.Tensor:
    """[4, 256]: values of either sign over eight orders of magnitude, other ones in each block."""
    exponents = uniform(4 * BLOCK, seed).mul(-8).view(4, BLOCK) - torch.arange(4)[:, None]
    return random(4, BLOCK, seed=seed).sign() * 10**exponents


# --- Codes -----------------------------------------------------------------------------------------------------------


def test_a_moment_comes_back_within_a_step_of_its_root() -> None:
    moment, noise = wide_range(), uniform(4 * BLOCK, 1)
    largest = moment.abs().amax(1, keepdim=True)
    first = decode_first(*first_code(moment, noise))
    roots = [(value.abs() / largest).sqrt() for value in (first, moment)]
    assert float((roots[0] - roots[1]).abs().max()) <= 1.001 / 127
    assert bool((first * moment >= 0).all())
    assert bool(((first - moment).abs() <= largest * 2.01 / 127).all())
    second = decode_second(*second_code(moment.abs(), noise))
    roots = [(value / largest).sqrt().sqrt() for value in (second, moment.abs())]
    assert float((roots[0] - roots[1]).abs().max()) <= 1.001 / 255
    assert bool(((second - moment.abs()).abs() <= largest * 4.03 / 255).all())


def test_the_largest_of_a_block_comes_back_as_it_was() -> None:
    moment = wide_range()
    for noise in (torch.zeros(4 * BLOCK), torch.full((4 * BLOCK,), 1 - 2**-12)):
        place = moment.abs().argmax(1, keepdim=True)
        for decoded, wanted in (
            (decode_first(*first_code(moment, noise)), moment),
            (decode_second(*second_code(moment.abs(), noise)), moment.abs()),
        ):
            torch.testing.assert_close(decoded.gather(1, place), wanted.gather(1, place), rtol=1e-6, atol=0)


def test_the_fourth_root_that_is_held_is_right_on_average() -> None:
    moment, rounds = wide_range().abs(), 4000
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(4, BLOCK)
    for _ in range(rounds):
        total += second_code(moment, torch.rand(4 * BLOCK, generator=generator))[0]
    wanted = ((moment / moment.amax(1, keepdim=True)) ** 0.25 * 255).clamp_min(1)
    assert float((total / rounds - wanted).abs().max()) < 5 * 0.5 / rounds**0.5  # standard errors of a coin's mean


def test_a_first_moment_is_right_on_average_however_small() -> None:
    shares = torch.tensor([1e-6, -1e-5, 1e-4, -1e-3, 1e-2, 0.1])
    moment = torch.cat([torch.ones(1), shares, torch.zeros(BLOCK - 7)])[None].repeat(20_000, 1)
    decoded = decode_first(*first_code(moment, uniform(moment.numel()))).double()[:, 1:7]
    apart = (decoded.mean(0) - shares).abs()
    assert bool((apart < 5 * decoded.std(0) / len(decoded) ** 0.5 + 1e-3 * shares.abs()).all()), (
        decoded.mean(0) / shares
    )


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-24])
def test_zeros_stay_zero_and_what_is_not_zero_is_never_divided_by_zero(noise: float) -> None:
    full = torch.full((BLOCK,), noise)
    zeros = torch.zeros(1, BLOCK)
    assert not decode_first(*first_code(zeros, full)).any()
    assert not decode_second(*second_code(zeros, full)).any()
    moment = torch.zeros(1, BLOCK)
    moment[0, :4] = torch.tensor([1.0, 1e-10, 1e-20, 1e-30])
    assert not decode_first(*first_code(moment, full))[0, 4:].any()
    second = decode_second(*second_code(moment, full))
    assert bool((second[0, :4] > 0).all())
    assert not second[0, 4:].any()


def test_values_of_bf16_are_not_rounded() -> None:
    values = torch.cat([wide_range().view(-1), torch.tensor([0.0, -0.0, 1.0, -1e38])]).bfloat16().float()
    for noise in (0.0, 0.5, 1 - 2**-24):
        assert torch.equal(round_to_bf16(values, torch.full((len(values),), noise)), values)


def test_rounding_to_bf16_is_right_on_average_and_gives_a_neighbour() -> None:
    value = torch.tensor([1.0, -1.0]).repeat_interleave(200_000) * (1 + 2**-7 * 0.2)
    rounded = round_to_bf16(value, uniform(400_000))
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7, -1.0, -1 - 2**-7}
    for part, mean in zip(rounded.view(2, -1), (value[0], value[-1]), strict=True):
        assert abs(float(part.mean() - mean)) < 5 * 0.4 * 2**-7 / 200_000**0.5 + 1e-6


# --- Steps -----------------------------------------------------------------------------------------------------------


def one_step(kind: Callable[..., torch.optim.Optimizer], sizes: list[tuple[int, ...]], decay: float) -> Named:
    named = {str(size): torch.nn.Parameter(random(*size, seed=len(size) + size[-1])) for size in sizes}
    optimizer = kind(named.values(), lr=0.01, betas=(0.9, 0.99), weight_decay=decay)
    for number, parameter in enumerate(named.values()):
        parameter.grad = random(*parameter.shape, seed=100 + number)
    optimizer.step()
    return named


@pytest.mark.parametrize("chunk", [BLOCK, 2 * BLOCK, adamw8bit.CHUNK])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_first_step_is_that_of_adamw(chunk: int, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing has been rounded yet: moments are used before they are encoded.
    monkeypatch.setattr(adamw8bit, "CHUNK", chunk)
    ours, theirs = (one_step(kind, SIZES, decay) for kind in (AdamW8bit, torch.optim.AdamW))
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.data, theirs[name].data, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("chunk", [BLOCK, adamw8bit.CHUNK])
def test_later_steps_stay_near_those_of_adamw(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw8bit, "CHUNK", chunk)
    start = random(3, 700)
    moved: list[torch.Tensor] = []
    for kind in (AdamW8bit, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=0.01)
        for step in range(20):
            parameter.grad = random(3, 700, seed=step % 5) + 0.3
            optimizer.step()
        moved.append(parameter.data - start)
    apart = (moved[0] - moved[1]).norm() / moved[1].norm()
    assert float(apart) < 0.03
    assert abs(float(moved[0].mean() / moved[1].mean()) - 1) < 0.005


def regression_loss(kind: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> float:
    """The mean loss of the last of 200 small steps from a start near the answer."""
    inputs = random(256, 40)
    answer = 1 + 0.2 * random(40, 16, seed=1)
    weight = torch.nn.Parameter((answer + 0.05 * random(40, 16, seed=2)).to(dtype))
    optimizer = kind([weight], lr=5e-4)
    losses: list[float] = []
    for _ in range(200):
        loss = (inputs @ weight.float() - inputs @ answer).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20


def test_a_regression_comes_as_far_as_with_adamw_where_plain_bf16_does_not() -> None:
    wanted = regression_loss(torch.optim.AdamW, torch.float32)
    assert regression_loss(AdamW8bit, torch.float32) < 1.1 * wanted + 1e-4
    ours, plain = (regression_loss(kind, torch.bfloat16) for kind in (AdamW8bit, torch.optim.AdamW))
    assert ours < 1.5 * wanted
    assert plain > 5 * ours


def test_weights_decay_without_a_gradient_of_their_own() -> None:
    for dtype, loose in ((torch.float32, 1e-6), (torch.bfloat16, 1e-4)):
        weight = torch.nn.Parameter(torch.ones(100, BLOCK, dtype=dtype))
        optimizer = AdamW8bit([weight], lr=0.01, weight_decay=0.1)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert float(weight.data.float().mean()) == pytest.approx(1 - 0.001, abs=loose)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameters = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer = AdamW8bit(parameters, lr=0.1, weight_decay=0.1)
    parameters[1].grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(parameters[0].data, torch.ones(5))
    assert set(optimizer.state) == {parameters[1]}
    assert not torch.equal(parameters[1].data, torch.ones(5))


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        AdamW8bit([torch.nn.Parameter(torch.ones(5))], lr=0.1).step(lambda: 0.0)


# --- State -----------------------------------------------------------------------------------------------------------


def parameters_of(dtype: torch.dtype) -> Named:
    return {f"layer.{size}": torch.nn.Parameter(random(*size, seed=9).to(dtype)) for size in SIZES}


def advance(named: Named, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step * 7)  # other states of the global generator must not matter
        for number, parameter in enumerate(named.values()):
            parameter.grad = random(*parameter.shape, seed=step * 10 + number).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_steps_give_the_same_bits(dtype: torch.dtype) -> None:
    runs: list[Named] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.rand(seed)
        named = parameters_of(dtype)
        advance(named, AdamW8bit(named.values(), lr=0.01), range(3))
        runs.append(named)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_a_checkpoint_it_goes_on_as_if_it_had_not_stopped(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = parameters_of(dtype)
    optimizer = AdamW8bit(whole.values(), lr=0.01, weight_decay=0.1)
    advance(whole, optimizer, range(3))
    folder = save_checkpoint(tmp_path, whole, optimizer, Progress(step=3), {}, {})
    advance(whole, optimizer, range(3, 6))
    again = parameters_of(dtype)
    second = AdamW8bit(again.values(), lr=0.01, weight_decay=0.1)
    load_checkpoint(folder, again, second)
    advance(again, second, range(3, 6))
    for name, parameter in whole.items():
        assert torch.equal(parameter, again[name]), name
        ours, theirs = optimizer.state[parameter], second.state[again[name]]
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
            assert same, (name, key)


def test_the_state_takes_two_bytes_a_weight_and_two_scales_a_block() -> None:
    weight = torch.nn.Parameter(torch.ones(10, 1000))
    optimizer = AdamW8bit([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    blocks = -(-weight.numel() // BLOCK)
    assert sum(value.nbytes for value in tensors) == blocks * (2 * BLOCK + 2 * 4)


# --- In C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1,), (257,), (1100, 300)])  # the last one in several chunks
def test_a_step_in_c_is_that_in_pytorch(
    size: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_c.native(torch.ones(1)) is None:
        pytest.skip("the functions in C cannot be compiled here")
    start, found = random(*size).to(dtype), []
    for real in (True, False):
        if not real:
            monkeypatch.setattr(in_c, "elementwise", lambda: None)
        weight = torch.nn.Parameter(start.clone())
        optimizer = AdamW8bit([weight], lr=0.01, weight_decay=0.1)
        weight.grad = random(*size, seed=1).to(dtype)
        optimizer.step()
        found.append((weight.detach().clone(), optimizer.state[weight]))
    (mine, state), (twin, twin_state) = found
    # What is rounded at random may fall to the other side where the two differ in their last digits.
    for name in ("first", "second"):
        assert (state[name].int() - twin_state[name].int()).abs().max() <= 1
        assert (state[name] != twin_state[name]).sum() <= 1e-3 * state[name].numel()
        torch.testing.assert_close(state[f"{name}_largest"], twin_state[f"{name}_largest"])
    different = (mine - twin).abs() > 1e-6 * twin.abs() + 1e-7
    assert different.sum() <= (1e-3 if dtype == torch.bfloat16 else 0) * mine.numel()
    torch.testing.assert_close(mine, twin, rtol=2**-7, atol=1e-6)
