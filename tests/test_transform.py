"""The transform against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch

import freqkv
from freqkv import transform

LENGTHS = [1, 2, 3, 31, 97, 508, 1021, 4092]
PAIRS = [(freqkv.dct, scipy.fft.dct), (freqkv.idct, scipy.fft.idct)]


@pytest.fixture(autouse=True, params=["matrix", "transforms"])
def way(request, monkeypatch):
    """How low-passes of any length, or of all but the longest, are computed."""
    monkeypatch.setattr(transform, "DENSE", {"matrix": 1100, "transforms": 0}[request.param])
    return request.param


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def _low_pass(x: np.ndarray, keep: int, axis: int) -> np.ndarray:
    coefficients = scipy.fft.dct(x, type=2, norm="ortho", axis=axis).take(range(keep), axis=axis)
    return scipy.fft.idct(coefficients, type=2, norm="ortho", axis=axis) * np.sqrt(keep / x.shape[axis])


def _relative(result: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(result - truth) / np.linalg.norm(truth))


def test_short_spans_take_the_matrix(monkeypatch):
    monkeypatch.undo()
    transform._low_pass_matrix.__wrapped__.cache_clear()
    made = transform._low_pass_matrix.__wrapped__.cache_info
    before = made().misses
    for n, times in ((transform.DENSE + 1, 0), (transform.DENSE, 1), (transform.DENSE, 1)):
        freqkv.low_pass(torch.zeros(n, 1), 77)
        assert made().misses == before + times


def test_autocast_changes_nothing():
    x = torch.from_numpy(_random(2, 31, 6)).float()
    with torch.autocast("cpu", torch.bfloat16):
        low = freqkv.low_pass(x, 12)
    assert torch.equal(freqkv.low_pass(x, 12), low)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_float64_equals_scipy(n, ours, theirs):
    x = _random(3, n, 5)
    truth = theirs(x, type=2, norm="ortho", axis=1)
    assert _relative(ours(torch.from_numpy(x), dim=1).numpy(), truth) < 1e-12


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_float32_loses_at_most_twice_what_scipy_loses(n, ours, theirs):
    x = _random(64, n).astype(np.float32)
    truth = theirs(x.astype(np.float64), type=2, norm="ortho")
    theirs_error = _relative(theirs(x, type=2, norm="ortho"), truth)
    rounding = np.finfo(np.float32).eps / 2  # the error of a result that is exact but for its last rounding
    assert _relative(ours(torch.from_numpy(x)).numpy(), truth) <= 2 * max(theirs_error, rounding)


def _cosines(n: int, keep: int) -> np.ndarray:
    """The low-pass as a matrix, from the definition of the DCT."""

    def basis(size: int) -> np.ndarray:
        frequencies, places = np.arange(keep)[:, None], np.arange(size) + 0.5
        return np.cos(np.pi * frequencies * places / size) * np.sqrt(np.where(frequencies == 0, 1, 2) / size)

    return np.sqrt(keep / n) * basis(keep).T @ basis(n)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_low_pass_equals_scipy_and_its_definition(n, ratio, grad):
    keep = max(1, int(n * ratio))
    x = _random(2, n, 3)
    ours = freqkv.low_pass(torch.from_numpy(x).requires_grad_(grad), keep, 1).detach().numpy()
    assert _relative(ours, _low_pass(x, keep, 1)) < 1e-12
    assert _relative(ours, _cosines(n, keep) @ x) < 1e-11


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("n", [97, 508])
def test_low_pass_float32_loses_at_most_twice_what_scipy_loses(n, grad):
    x = _random(64, n).astype(np.float32)
    truth = _low_pass(x.astype(np.float64), n // 2, 1)
    ours = freqkv.low_pass(torch.from_numpy(x).requires_grad_(grad), n // 2, -1).detach().numpy()
    assert _relative(ours, truth) <= 2 * _relative(_low_pass(x, n // 2, 1), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [31, 508])
def test_half_precision_is_transformed_in_float32(dtype, n):
    x = torch.from_numpy(_random(4, n, 7)).to(dtype)
    for ours, theirs in PAIRS:
        truth = theirs(x.double().numpy(), type=2, norm="ortho", axis=1)
        result = ours(x, dim=1)
        assert result.dtype == dtype
        # one rounding to the dtype at the end, with a little room for the float32 arithmetic before it
        assert abs(result.double().numpy() - truth).max() <= 1.01 * torch.finfo(dtype).eps / 2 * abs(truth).max()


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -4])
def test_any_dimension(dim):
    x = torch.from_numpy(_random(4, 5, 6, 7))
    truth = scipy.fft.dct(x.numpy(), type=2, norm="ortho", axis=dim)
    assert _relative(freqkv.dct(x, dim=dim).numpy(), truth) < 1e-12
    assert freqkv.low_pass(x, 3, dim).shape[dim] == 3
    assert torch.allclose(freqkv.idct(freqkv.dct(x, dim), dim), x, atol=1e-12)


def test_gradients():
    x = torch.from_numpy(_random(2, 13, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: freqkv.dct(x, 1), x)
    assert torch.autograd.gradcheck(lambda x: freqkv.idct(x, 1), x)
    assert torch.autograd.gradcheck(lambda x: freqkv.low_pass(x, 6, 1), x)


@pytest.mark.parametrize(("n", "keep"), [(2, 1), (31, 15), (508, 254), (97, 60)])
def test_low_pass_as_a_matrix(n, keep):
    matrix = freqkv.low_pass(torch.eye(n, dtype=torch.float64), keep, 0)
    assert torch.allclose(matrix.sum(1), torch.ones(keep, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(torch.linalg.svdvals(matrix), torch.tensor(keep / n, dtype=torch.float64).sqrt(), atol=1e-12)


def test_constants_pass_unchanged():
    x = torch.full((2, 31, 3), 1.5)
    assert torch.allclose(freqkv.low_pass(x, 15), torch.full((2, 15, 3), 1.5), atol=1e-6)


def test_tables_made_under_inference_mode_serve_training():
    x = torch.randn(2, 23, 3)
    with torch.inference_mode():
        freqkv.low_pass(x, 11)
    leaf = x.clone().requires_grad_()
    freqkv.low_pass(leaf, 11).sum().backward()
    assert leaf.grad is not None


def test_forward_derivatives_and_vmap():
    x, tangent = torch.from_numpy(_random(4, 13, 3)), torch.from_numpy(_random(4, 13, 3))
    _, derivative = torch.func.jvp(lambda x: freqkv.low_pass(x, 6, 1), (x,), (tangent,))
    assert torch.allclose(derivative, freqkv.low_pass(tangent, 6, 1), atol=1e-12)
    rows = torch.func.vmap(lambda x: freqkv.low_pass(x, 6, 0))(x)
    assert torch.allclose(rows, freqkv.low_pass(x, 6, 1), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_is_left_alone(dtype):
    """Whatever its strides are."""
    buffer = torch.from_numpy(_random(2, 31, 6)).to(dtype)
    x, before = buffer[:, 4:29, ::2], buffer.clone()
    expected = freqkv.low_pass(x.contiguous(), 12)
    assert torch.allclose(freqkv.low_pass(x, 12), expected)
    assert torch.equal(buffer, before)


def test_errors():
    with pytest.raises(TypeError, match="floating point"):
        freqkv.dct(torch.arange(4))
    with pytest.raises(ValueError, match="at least one entry"):
        freqkv.dct(torch.zeros(2, 0))
    for keep in (0, 6):
        with pytest.raises(ValueError, match="between 1 and n = 5"):
            freqkv.low_pass(torch.zeros(5, 2), keep, 0)


def test_compressors():
    keys, values = torch.from_numpy(_random(2, 3, 12, 4)), torch.from_numpy(_random(2, 3, 12, 5))
    kept = freqkv.keep_recent(keys, values, 5)
    assert torch.equal(kept[0], keys[:, :, 7:])
    assert torch.equal(kept[1], values[:, :, 7:])
    pooled = freqkv.mean_pool(keys, values, 4)
    assert torch.allclose(pooled[0], keys.unflatten(2, (4, 3)).mean(3))
    assert torch.allclose(pooled[1], values.unflatten(2, (4, 3)).mean(3))
    low = freqkv.low_pass_entries(keys, values, 6)
    assert _relative(low[0].numpy(), _low_pass(keys.numpy(), 6, 2)) < 1e-12


def test_a_compiled_low_pass_is_one_graph():
    n = 101
    x = torch.randn(2, n, 3, requires_grad=True)
    compiled = torch.compile(lambda x: freqkv.low_pass(x, n // 3), backend="eager", fullgraph=True)
    expected, got = freqkv.low_pass(x, n // 3), compiled(x)
    assert torch.allclose(got, expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(got.square().sum(), x)
    (truth,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.allclose(gradient, truth, atol=1e-5)
