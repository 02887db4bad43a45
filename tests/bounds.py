"""How far a result may be from the exact one: derived here once, true on every machine, and used by all tests.

    bounds.assert_close(found, exact, magnitude=..., roundings=...)

checks ``|found - exact| <= roundings * u * magnitude`` element by element, where u = eps / 2 is the largest relative
error of one rounding. Neither factor is measured on the machine at hand or tuned:

* ``magnitude`` is the size of the terms that were added up to make the element. The result itself is no measure of it:
  terms of either sign cancel, their errors do not. ``majorant`` and ``sensitivity`` compute it in float64.
* ``roundings`` is how many errors of a relative size of u meet in one element. It is counted from the formula.

**A sum of K terms** x_i, in any order and any blocks, with or without fused multiply-add. Each of the K - 1 additions
multiplies its partial sum by 1 + d with |d| <= u, so term i is multiplied by at most K such factors, and to first order

    |error| <= K u sum |x_i|                                   (worst case: magnitude = sum |x_i|, roundings = K)

Products x_i = a_i b_i add one rounding each: K + 1. The bound does not depend on the instruction set, the number of
threads or the library, and no sum exceeds it. For K = 3,600 it is 50 to 100 times what happens, because the errors have
either sign. The error is sum_j d_j S_j over the partial sums S_j. With d_j independent, of mean 0 and at most u, and
partial sums that are in the root mean square at most r = sqrt(sum x_i^2), as they are for terms of random signs, the
inequality of Hoeffding and Azuma gives

    P(|error| > l sqrt(K) u r) <= 2 exp(-l^2 / 2)              (likely: magnitude = r, roundings = l sqrt(K))

**A maximum over n numbers** exceeds a bound if one of the n does: P <= 2 n exp(-l^2 / 2), whether they depend on each
other or not. ``likely`` solves this for l at P = 1e-9 for each assertion: l = sqrt(2 ln(2e9 n)), 6.9 for ten numbers
and 8.4 for a million. Use the likely bound only with terms that have random signs and digits; a sum of equal terms, as
a mean of ones, rounds the same way every time and needs the worst case.

**A polynomial with positive coefficients** of its arguments (sums, matrix products, convolutions, recurrences that are
linear in decay, impulse and state, and all gradients of these) is a sum of products. The same formula evaluated at
absolute values is the sum of the absolute values of those products: that is ``majorant``. An element computed with at
most R roundings on the way of any one product is right to R u majorant. For h_t = a_t h_{t-1} + x_t over T steps
R = 2 T (a product and a sum a step), and for its gradients by a and by what is broadcast R = 4 T + K, where K terms are
added up at the end. Chunks, trees and running products only rearrange these factors.

**Any other function**, as gates, layers and networks: to first order the error of a result y is the sum over all
intermediate values z_k, computed with the relative error d_k, of (dy/dz_k) z_k d_k. If |d_k| <= c u and the d_k are
independent, the same inequality gives |error| <= l c u s with s = sqrt(sum_k ((dy/dz_k) z_k)^2), the root of the sum of
squares of all that can go wrong. ``sensitivity`` computes s: it evaluates the function in float64 with every argument
and the result of every operation, forward and backward, multiplied by 1 + D or 1 - D at random with D = 2^-20 (Monte
Carlo arithmetic: Parker 1997). The mean square of the change is (D s)^2; D is far above the rounding of float64, and
far below where the second order counts (D^2), so that s is the same on every machine. Decays, gates and states carry
their change through time as they would carry an error. c counts the roundings of one operation: sqrt(K) for a sum of K
products as above, 1 for a product or a sum, 4 for exp, sigmoid and tanh (CPU libraries promise 1 ulp, vector and GPU
versions 2 to 4; an ulp is at most 2 u).
"""

import math
import random
from collections.abc import Callable
from functools import cache

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import draws

_RISK = 1e-9
_STEP = 2.0**-20
_PROBES = 4


def roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of rounding to the nearest number of the dtype."""
    return torch.finfo(dtype).eps / 2


def likely(numbers: int, terms: int = 1) -> float:
    """l sqrt(terms): roundings that no one of so many numbers exceeds, each the sum of so many terms; P = 1e-9."""
    return math.sqrt(2 * math.log(2 * max(numbers, 1) / _RISK) * max(terms, 1))


def assert_close(found, exact, *, magnitude, roundings, dtype=None, stored=1, name="result") -> None:
    """|found - exact| <= roundings u magnitude for all elements, and one more rounding where it is stored.

    Args:
        found: a tensor, or any tree of tensors.
        exact: the same in float64 (or as exact as it comes: its own error then counts among the roundings).
        magnitude: the size of what was added up, as a number, a tensor that broadcasts, or a tree of these.
        roundings: how many relative errors of u meet in an element, as a number or a tree.
        dtype: of the arithmetic; by default that of ``found``, but at least 32 bits, as the carry has.
        stored: roundings of the result itself to the dtype of ``found``.
        name: what to call it where it fails.
    """
    found, exact = (pytree.tree_flatten_with_path(x)[0] for x in (found, exact))
    names = [pytree.keystr(path) for path, _ in found]
    assert names == [pytree.keystr(path) for path, _ in exact], f"{name}: the results are others than the exact ones"
    many = [pytree.tree_leaves(x) if _is_tree(x) else [x] * len(exact) for x in (magnitude, roundings)]
    for at, (_, x), (_, y), scale, count in zip(names, found, exact, *many, strict=True):
        _assert_close(x, y, scale, count, dtype, stored, name + at)


def assert_agrees(found, run, *tensors, terms, dtype=None, name="result") -> None:
    """``found`` is what ``run`` gives of the tensors, computed in another way or dtype; by the likely bound.

    Args:
        found: a tensor, or any tree of tensors.
        run: gives the same of the tensors in float64; see ``sensitivity``.
        tensors: any trees.
        terms: in the longest sum of one element, through time too where there is a recurrence.
        dtype, name: as for ``assert_close``.
    """
    tensors = pytree.tree_map(_wide, tensors)
    exact, magnitude = run(*tensors), sensitivity(run, *tensors)

    def roundings(x, y):
        both = 2 if dtype is None and torch.finfo(x.dtype).eps == torch.finfo(y.dtype).eps else 1
        return both * likely(y.numel(), terms)

    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(exact), strict=True)
    counts = [roundings(x, y) for x, y in pairs]
    assert_close(found, exact, magnitude=magnitude, roundings=counts, dtype=dtype, name=name)


def majorant(run: Callable, *tensors):
    """``run`` at the absolute values of the tensors, in float64: the sums of the absolute values of all terms."""

    def absolute(x):
        if not isinstance(x, torch.Tensor) or not (x.is_floating_point() or x.is_complex()):
            return x
        return x.detach().abs().double().requires_grad_(x.requires_grad)

    results = run(*pytree.tree_map(absolute, tensors))
    return pytree.tree_map(lambda y: y.detach().abs(), results)


def sensitivity(run: Callable, *tensors):
    """The root of the sum of squares of all that rounding can change in the results of ``run``: one number a tensor.

    Args:
        run: a function of the tensors, in float64; gradients that it takes inside count too. It may not draw from the
            global random generator without seeding it.
        tensors: any trees; what floats in them is changed too.

    Returns:
        A tree as that of the results, with one number for each tensor: the largest of its elements.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations
    exact = run(*tensors)  # before the changed ones: what it caches must be exact
    squares = pytree.tree_map(lambda y: torch.zeros(y.shape, dtype=torch.float64), exact)
    for seed in range(_PROBES):
        mode = _Changed(seed)
        leaves = pytree.tree_map(mode.changed_leaf, tensors)
        with mode:
            changed = run(*leaves)
        difference = pytree.tree_map(lambda y, z: ((y.detach() - z.detach()).abs() / _STEP) ** 2, changed, exact)
        squares = pytree.tree_map(torch.add, squares, difference)
    torch.set_num_threads(threads)
    return pytree.tree_map(lambda y: (y.max() / _PROBES).sqrt() if y.numel() else y.sum(), squares)


def _wide(x):
    if not isinstance(x, torch.Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.detach().to(torch.promote_types(x.dtype, torch.float64)).requires_grad_(x.requires_grad)


def _is_tree(x) -> bool:
    return isinstance(x, tuple | list | dict)


def _assert_close(found, exact, magnitude, roundings, dtype, stored, name) -> None:
    assert found.shape == exact.shape, f"{name}: expected the shape {tuple(exact.shape)}, got {tuple(found.shape)}"
    if not found.numel():
        return
    dtype = torch.promote_types(found.dtype, torch.float32) if dtype is None else dtype
    wide = torch.complex128 if found.is_complex() or exact.is_complex() else torch.float64
    narrow, found, exact = found.dtype, found.detach().to(wide), exact.detach().to(wide)
    # The absolute term is for what underflows: half the distance of the smallest numbers, each time.
    lost = roundings * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    lost += stored * torch.finfo(narrow).smallest_normal * torch.finfo(narrow).eps
    bound = roundings * roundoff(dtype) * torch.as_tensor(magnitude, dtype=torch.float64, device=exact.device)
    bound = (bound + stored * roundoff(narrow) * exact.abs() + lost).expand(exact.shape)
    error = (found - exact).abs()
    # What is infinite, or overflows where it is stored, or is missing, is right if it is the same.
    same = (found == exact.to(narrow)) | (found.isnan() & exact.isnan())
    wrong = ~(same | (exact.isfinite() & (error <= bound)))
    if wrong.any():
        ratio = torch.where(wrong, error / bound, 0).nan_to_num(torch.inf)
        at = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off, most at {at}: expected "
            f"{exact[at].item()}, got {found[at].item()}, {error[at].item():.3g} apart, bound {bound[at].item():.3g}"
        )


class _Changed(TorchDispatchMode):
    """Multiplies the result of every operation by 1 + D or 1 - D, each element at random."""

    def __init__(self, seed: int):
        super().__init__()
        self.random = random.Random(seed)

    def changed_leaf(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        factor = self.factor(x)
        return x if factor is None else (x.detach() * factor).requires_grad_(x.requires_grad)

    def factor(self, x):
        if not isinstance(x, torch.Tensor) or not (x.is_floating_point() or x.is_complex()):
            return None
        if not x.numel() or x._is_zerotensor():  # without memory
            return None
        pool = _pool(x.is_complex(), x.device)
        start, n = self.random.randrange(len(pool)), x.numel()
        if start + n > len(pool):
            pool = torch.cat([pool[start:], *[pool] * (1 + n // len(pool))])
            start = 0
        return pool[start : start + n].view(x.shape)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        for x, described in zip(results, function._schema.returns, strict=False):
            alias = described.alias_info
            if alias is not None and not alias.is_write:
                continue  # a view computes nothing
            factor = self.factor(x)
            if factor is not None:
                x.mul_(factor)
        return result


@cache
def _pool(complex_numbers: bool, device) -> torch.Tensor:
    """Factors 1 + D and 1 - D at random, drawn once: which of them an operation gets is drawn each time."""
    signs = torch.randint(2, (1 << 16, 2), generator=draws.generator()).double() * 2 - 1
    signs = torch.view_as_complex(signs) if complex_numbers else signs[:, 0]
    return (1 + _STEP * signs).to(device)
