"""FLOPs of a call, by operator: of what torch's counter knows, of what it does not, and what nobody can price."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from stepmark.audit import Guard
from stepmark.meter.counts import ALL, Ledger


def _mv_flops(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _mm_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _dot_flops(vector: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * vector[0]


def _distance_flops(first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    return 3 * math.prod(first) * second[-2]  # a difference, a product and a sum for each pair of rows and each column


def _trilinear_flops(*given: Any, **_: Any) -> int:
    """Three tensors, each with axes of length 1 put in at the places named, multiplied and summed (`nn.Bilinear`)."""
    wide = []
    for shape, places in zip(given[:3], given[3:6], strict=True):
        own = list(shape)
        for place in sorted(places):
            own.insert(place, 1)
        wide.append(own)
    return 3 * math.prod(map(max, *wide))


def _factoring(factor: float, sides: int = 0) -> Callable[..., int]:
    """FLOPs of operators on matrices m x n: `factor` m n min(m, n), and `sides` n^2 for each column of a second argument
    (LAPACK's counts to leading order)."""

    def flops(matrix: Sequence[int], other: Sequence[int] = (), *_: Any, **__: Any) -> int:
        *batch, m, n = matrix
        columns = other[-1] if sides and isinstance(other, Sequence) and len(other) > 1 else 1
        return round(math.prod(batch) * (factor * m * n * min(m, n) + sides * n * n * columns))

    return flops


def _fourier_flops(signal: Sequence[int], *_: Any, **__: Any) -> int:
    return round(5 * math.prod(signal) * math.log2(max(2, math.prod(signal[1:]))))


_BY_NAME: dict[str, Callable[..., int]] = {
    "mv": _mv_flops,
    "_int_mm": _mm_flops,
    "dot": _dot_flops,
    "vdot": _dot_flops,
    "_trilinear": _trilinear_flops,
    "_cdist_forward": _distance_flops,
    "_euclidean_dist": _distance_flops,
    "linalg_cholesky_ex": _factoring(1 / 3),
    "cholesky": _factoring(1 / 3),
    "cholesky_inverse": _factoring(2 / 3),
    "linalg_inv_ex": _factoring(2),
    "_linalg_det": _factoring(2 / 3),
    "_linalg_slogdet": _factoring(2 / 3),
    "linalg_lu": _factoring(2 / 3),
    "linalg_lu_factor_ex": _factoring(2 / 3),
    "_linalg_solve_ex": _factoring(2 / 3, 2),
    "linalg_solve_triangular": _factoring(0, 1),
    "triangular_solve": _factoring(0, 1),
    "cholesky_solve": _factoring(0, 2),
    "linalg_qr": _factoring(4),
    "_linalg_svd": _factoring(22),
    "_linalg_eigh": _factoring(9),
    "linalg_eig": _factoring(25),
    "linalg_lstsq": _factoring(2, 2),
    "_fft_c2c": _fourier_flops,
    "_fft_r2c": _fourier_flops,
    "_fft_c2r": _fourier_flops,
}
FORMULAS = {
    getattr(torch.ops.aten, name): formula for name, formula in _BY_NAME.items() if hasattr(torch.ops.aten, name)
}
# As they stand here: what a plugin registers with torch later prices nothing.
_ALL: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{packet: shape_wrapper(formula) for packet, formula in FORMULAS.items()},
}
# Operators without a formula: those that only move numbers or make them from nothing, and those that look at each number
# once or a few times.
_MOVING = frozenset(
    """
    arange as_strided bernoulli block_diag cat clone col2im constant_pad_nd copy diag diag_embed diagonal_scatter embedding empty
    empty_like empty_permuted empty_strided exponential eye fill flip full full_like gather im2col index index_copy
    index_fill index_put index_select item lift_fresh linspace local_scalar_dense logspace masked_fill masked_scatter
    masked_select multinomial new_empty new_full new_ones new_zeros nonzero normal ones ones_like permute pixel_shuffle
    pixel_unshuffle put rand rand_like randint randint_like randn randn_like random randperm reflection_pad2d repeat
    repeat_interleave replication_pad2d reshape_copy resize roll rot90 scalar_tensor scatter select_scatter set
    slice_scatter squeeze stack t take to_copy transpose tril tril_indices triu triu_indices unfold_copy uniform
    unsafe_index unsafe_index_put unsafe_view unsqueeze view_copy zero zeros zeros_like
    """.split()
)
_READING = frozenset(
    """
    adaptive_avg_pool2d affine_grid_generator all amax amin aminmax any argmax argmin argsort avg_pool2d bincount
    bucketize count_nonzero cummax cummin cumprod cumsum diff embedding_bag equal grid_sampler_2d histc index_add
    index_reduce is_nonzero isin kthvalue linalg_vector_norm log_softmax logcumsumexp logsumexp max
    max_pool2d_with_indices mean median min mode nanmedian native_batch_norm native_batch_norm_legit_no_training
    native_dropout native_group_norm native_layer_norm nll_loss2d_forward nll_loss_forward norm prod safe_softmax
    scatter_add scatter_reduce searchsorted softmax sort std std_mean sum topk trace unique unique2
    unique_consecutive unique_dim upsample_bicubic2d upsample_bicubic2d_aa upsample_bilinear2d upsample_bilinear2d_aa
    upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest_exact1d
    upsample_nearest_exact2d upsample_nearest_exact3d upsample_trilinear3d var var_mean
    """.split()
)


class Operators(TorchDispatchMode):
    """Adds up FLOPs by the formulas of torch and of `FORMULAS`, counts operators, adds up the arithmetic outside counted
    calls, names operators whose FLOPs nobody knows.

    What `FlopCounterMode` finds, to the last one, at a fifth of its seconds: it attributes FLOPs to modules, which costs
    more than small networks do.
    """

    def __init__(self, ledger: Ledger, flops: Flops, guard: Guard | None = None) -> None:
        super().__init__()
        self._ledger, self._flops, self._guard = ledger, flops, guard
        self._known: dict[Any, tuple[str, Callable[..., int] | None, bool, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._known.get(func)
        if known is None:
            formula = _ALL.get(func.overloadpacket)
            draws = any(argument.name == "generator" for argument in func._schema.arguments)
            known = self._known[func] = _kind_of(func), formula, formula is None and _is_composite(func), draws
        kind, formula, composite, draws = known
        if draws and self._guard is not None:
            self._guard.sees(args, kwargs)
        if composite:
            with self:
                return func.decompose(*args, **kwargs)
        found = func(*args, **kwargs)
        if formula is not None:
            self._flops.total += formula(*args, **kwargs, out_val=found)
        self._flops.operators += 1
        if kind == "unknown":
            name = str(func)
            if name not in self._flops.unpriced:
                self._flops.unpriced.append(name)
        elif kind == "elements" and self._ledger.active == 0:
            touched = [value for value in (*args, found) if isinstance(value, Tensor)]
            self._flops.arithmetic += max((value.numel() for value in touched), default=0)
        return found


def _is_composite(func: Any) -> bool:
    """Whether an operator consists of others, which are looked at in its place."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _kind_of(func: Any) -> str:
    """Of an operator: whether its FLOPs are "counted", grow with the "elements" that it touches, are none or "unknown"."""
    packet = func.overloadpacket
    if packet in _ALL:
        return "counted"
    if torch.Tag.pointwise in func.tags:
        return "elements"
    if func.is_view or not any(isinstance(r.type, torch.TensorType) for r in func._schema.returns):
        return "free"
    name = packet.__name__.strip("_")
    if name.endswith(("_backward", "_backward_data")):  # those of products have a formula
        return "elements"
    return "elements" if name in _READING else "free" if name in _MOVING else "unknown"


@dataclass
class Flops:
    """FLOPs of one call: all of them, those outside any counted call, those inside the calls of each handle, and uncounted
    modules that ran.

    `operators`: how many were called. `arithmetic`: elements that were computed one by one outside any counted call;
    `unpriced`: operators that ran and whose FLOPs nobody knows. `held`: greatest bytes in key/value caches at the start of a
    layer, a layer's own pass left out. `read`: those bytes summed over the calls of layers, each of which reads its share of
    its cache. `ranks`: the share of each process of a method that runs on several.
    """

    total: int = 0
    outside: int = 0
    inside: dict[str, int] = field(default_factory=dict)
    held: int = 0
    read: float = 0.0
    ranks: list[int] = field(default_factory=list)
    operators: int = 0
    arithmetic: int = 0
    unpriced: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)


@contextlib.contextmanager
def count_flops(ledger: Ledger, watched: Sequence[nn.Module], guard: Guard | None = None) -> Iterator[Flops]:
    """Count FLOPs (2 per multiply-add) of the calling thread while inside, where `guard` is too; never time under it.

    The fused path of `nn.MultiheadAttention` and the mkldnn LSTM are switched off while inside, so that the operators in
    them are seen. Modules with weights that run without belonging to a watched network, and modules that run in another
    thread, are named in the result.
    """
    known = {id(part) for network in watched for part in network.modules()}
    result = Flops()
    own = threading.get_ident()

    def before(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != own:
            result.threads.append(type(module).__name__)
        elif id(module) not in known and ledger.active == 0 and _has_weights(module):
            result.strays.append(type(module).__name__)

    hook = nn.modules.module.register_module_forward_pre_hook(before)
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(part, nn.LSTM) for network in watched for part in network.modules())
    mkldnn = torch.backends.mkldnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    ledger.flops_inside, ledger.entered, ledger.flops_now = {}, {}, lambda: result.total
    ledger.held, ledger.read = 0, 0.0
    ledger.caches.clear()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with mkldnn, guard or contextlib.nullcontext(), Operators(ledger, result, guard):
            yield result
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        hook.remove()
        ledger.flops_now = None
        result.outside = result.total - ledger.flops_inside.pop(ALL, 0)
        result.inside = ledger.flops_inside
        result.held, result.read = ledger.held, ledger.read


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), next(module.buffers(), None)) is not None
