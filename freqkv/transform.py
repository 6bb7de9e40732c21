"""The transform: an orthonormal DCT along one dimension and the low-pass that is made of it.

Everything is computed in float32, or in float64 for float64 input, is differentiable, and knows nothing of caches. DCTs are
made of real FFTs (Makhoul, "A fast cosine transform in one and two dimensions", 1980). The low-pass of up to `DENSE` entries
is one product with a matrix; longer spans are transformed, on a CPU where no derivative is asked for by scipy. Which is fastest
where is measured by `examples/speed.py transform`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, TypeVar

import scipy.fft
import torch
from torch import Tensor

__all__ = ["compute_dtype", "dct", "full_precision", "idct", "low_pass"]

Function = TypeVar("Function", bound=Callable[..., Any])
DENSE = 512  # entries up to which a matrix product is faster than transforms, with derivatives or without


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which entries of `dtype` are transformed and rotated: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dct(x: Tensor, dim: int = -1) -> Tensor:
    """Orthonormal DCT-II along `dim`: `scipy.fft.dct(x, type=2, norm="ortho", axis=dim)`.

    Parameters
    ----------
    x : Tensor
        Any shape, any floating dtype. float64 is transformed in float64, all else in float32.
    dim : int
        The dimension to transform, of length n >= 1.

    Returns
    -------
    Tensor
        Same shape and dtype as `x`.

    Raises
    ------
    TypeError
        If `x` is not floating point.
    ValueError
        If the dimension is empty.
    """
    return _dct(_prepare(x, dim)).movedim(-1, dim).to(x.dtype)


def idct(x: Tensor, dim: int = -1) -> Tensor:
    """Inverse of :func:`dct` (orthonormal DCT-III): `scipy.fft.idct(x, type=2, norm="ortho", axis=dim)`.

    Parameters, return value and errors are those of :func:`dct`.
    """
    return _idct(_prepare(x, dim)).movedim(-1, dim).to(x.dtype)


def low_pass(x: Tensor, keep: int, dim: int = -2) -> Tensor:
    """Resample `x` along `dim` to `keep` entries that hold its `keep` lowest frequencies (FreqKV, section 3.2).

    The DCT-II coefficients above `keep` are dropped, the rest is inverted at length `keep` and scaled by
    `sqrt(keep / n)`, which keeps amplitudes: a constant passes unchanged. Entry j of the result sits at position
    `(j + 0.5) * n / keep - 0.5` of the input.

    Parameters
    ----------
    x : Tensor
        Any shape, any floating dtype; n entries along `dim`. For keys and values `(batch, heads, n, head_dim)`.
    keep : int
        Number of entries to keep, 1 <= keep <= n.
    dim : int
        The dimension to compress; the sequence of keys and values by default.

    Returns
    -------
    Tensor
        Shape of `x` with `keep` in place of n, dtype of `x`.

    Raises
    ------
    TypeError
        If `x` is not floating point.
    ValueError
        If `keep` is not in 1..n.
    """
    n = x.shape[dim]
    if not 1 <= keep <= n:
        raise ValueError(f"low_pass keeps between 1 and n = {n} entries, got keep={keep}")
    _check(x, dim)
    scale = math.sqrt(keep / n)
    if n <= DENSE:
        rows = x.to(compute_dtype(x.dtype))
        matrix = _low_pass_matrix(n, keep, rows.dtype, rows.device)
        with full_precision(x.device):
            if x.ndim == 1:
                return torch.mv(matrix, rows).to(x.dtype)
            return torch.matmul(matrix, rows.movedim(dim, -2)).movedim(-2, dim).to(x.dtype)
    prepared = _prepare(x, dim)
    if _is_plain_data(x):
        entries = prepared.detach().numpy()
        threads = torch.get_num_threads()
        coefficients = scipy.fft.dct(entries, axis=-1, norm="ortho", workers=threads)[..., :keep]
        result = torch.from_numpy(scipy.fft.idct(coefficients, axis=-1, norm="ortho", workers=threads)).mul_(scale)
    else:
        result = _idct(_dct(prepared)[..., :keep]) * scale
    return result.movedim(-1, dim).to(x.dtype)


def _is_plain_data(x: Tensor) -> bool:
    """Whether only the numbers of `x` are asked for, and a CPU has them."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # inside vmap, grad and their like
        and torch.autograd.forward_ad.unpack_dual(x).tangent is None
    )


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """In which autocast, if it is on, does not touch what is computed."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _prepare(x: Tensor, dim: int) -> Tensor:
    """In the dtype of computing, the dimension last."""
    _check(x, dim)
    return x.to(compute_dtype(x.dtype)).movedim(dim, -1)


def _check(x: Tensor, dim: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"the DCT takes floating point input, got {x.dtype}; convert it first")
    if x.shape[dim] == 0:
        raise ValueError(f"the DCT needs at least one entry along dim={dim}, got shape {tuple(x.shape)}")


def _dct(x: Tensor) -> Tensor:  # (..., n) -> (..., n)
    n = x.shape[-1]
    cos, sin, scale = _twiddles(n, x.dtype, x.device)
    spectrum = torch.fft.rfft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1))  # (..., n // 2 + 1)
    real = spectrum.real * cos + spectrum.imag * sin
    imag = spectrum.imag * cos - spectrum.real * sin
    return torch.cat([real, -imag[..., 1 : (n + 1) // 2].flip(-1)], dim=-1) * scale


def _idct(x: Tensor) -> Tensor:  # (..., n) -> (..., n)
    n = x.shape[-1]
    cos, sin, scale = _twiddles(n, x.dtype, x.device)
    x = x / scale
    real = x[..., : n // 2 + 1]
    imag = torch.cat([torch.zeros_like(x[..., :1]), -x[..., n - n // 2 :].flip(-1)], dim=-1)
    spectrum = torch.complex(real * cos - imag * sin, real * sin + imag * cos)
    permuted = torch.fft.irfft(spectrum, n=n)
    even, odd = permuted.split([n - n // 2, n // 2], dim=-1)
    odd = odd.flip(-1)
    if n % 2:  # the last even entry has no partner
        even, last = even[..., :-1], even[..., -1:]
        return torch.cat([torch.stack([even, odd], dim=-1).flatten(-2), last], dim=-1)
    return torch.stack([even, odd], dim=-1).flatten(-2)


def _constant(function: Function) -> Function:
    """Keep what it makes of each size; in compiled graphs it is a constant, where Dynamo would trace how it is made."""
    kept = lru_cache(maxsize=16)(function)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    @wraps(kept)
    def constant(*args: Any) -> Any:
        return kept(*args)

    return constant  # type: ignore[no-any-return]


@_constant
def _twiddles(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Cos and sin of pi k / 2n for k <= n / 2, and the orthonormal scale of all n coefficients."""
    with torch.inference_mode(False):  # these outlive the call: inference tensors could not enter a graph later
        angle = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu") * (math.pi / (2 * n))
        scale = torch.full((n,), math.sqrt(2 / n), dtype=torch.float64, device="cpu")
        scale[0] = math.sqrt(1 / n)
        cos, sin, scale = (t.to(dtype=dtype, device=device) for t in (angle.cos(), angle.sin(), scale))
        return cos, sin, scale


@_constant
def _low_pass_matrix(n: int, keep: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(keep, n)`: what each entry of the input gives to each of the output."""
    with torch.inference_mode(False):
        spectra = scipy.fft.dct(torch.eye(n, dtype=torch.float64).numpy(), axis=0, norm="ortho")
        matrix = scipy.fft.idct(spectra[:keep], axis=0, norm="ortho") * math.sqrt(keep / n)
        return torch.from_numpy(matrix).to(dtype=dtype, device=device)
