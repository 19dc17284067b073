"""Count the memory and the operations of code that runs on tensors without storage."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper


aten = torch.ops.aten


def _attention_flops(query, key, *args, **kwargs) -> int:
    """Operations of q k^T and of the product with v, for shapes (B, heads, N, d) and (B, heads, M, d)."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _attention_backward_flops(gradient, query, key, *args, **kwargs) -> int:
    """Five products, of which one recomputes q k^T."""
    return _attention_flops(query, key) * 5 // 2


# torch has no formula for the fused attention of the CPU.
FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flops),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward_flops),
}


@dataclass
class Measurement:
    """
    What a block of code uses, beside the tensors that exist before it.

    Attributes:
        peak: most bytes of memory that are in use at once, without those of `gradients`.
        gradients: bytes of the gradients of parameters at this moment, at the given share.
        cache: bytes of the cache of keys and values at its end, which `peak` includes.
        flops: floating-point operations; a multiplication and an addition are two.
    """

    peak: int = 0
    gradients: int = 0
    cache: int = 0
    flops: int = 0


@contextmanager
def measured(modules: Iterable[nn.Module] = (), gradient_share: float = 1.0) -> Iterator[Measurement]:
    """
    Measure a block that runs `modules` on fake tensors, which have shapes and dtypes but no storage.

    The kernels are those of the CPU. Decisions that depend on values are taken as if a condition holds and a number
    is 1, so checks of values pass.

    Args:
        modules: modules that the block runs. Their weights are replaced by fake tensors.
        gradient_share: part of the gradients of parameters that stays in memory.
    """
    measurement = Measurement()
    with FakeTensorMode():
        for module in modules:
            make_fake(module)
        with _Meter(measurement, modules, gradient_share):
            yield measurement


def make_fake(module: nn.Module) -> None:
    """Replace the parameters and the buffers of a module on the meta device by fake tensors of the CPU."""
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the original, whose id stays in use

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in replaced:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = tensor, fake
        return replaced[id(tensor)][1]

    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            tensors.update({name: replace(tensor) for name, tensor in tensors.items() if tensor is not None})


@dataclass(eq=False)
class _Meter(TorchDispatchMode):
    """Follows the storages that operations create until they are freed."""

    measurement: Measurement
    modules: Iterable[nn.Module]
    gradient_share: float
    live: int = 0
    gradients: int = 0
    known: weakref.WeakSet = field(default_factory=weakref.WeakSet)
    of_gradients: weakref.WeakSet = field(default_factory=weakref.WeakSet)

    def __post_init__(self):
        super().__init__()
        for module in self.modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.known.add(tensor.untyped_storage())
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._count_gradient)

    def _count_gradient(self, parameter: nn.Parameter) -> None:
        storage = parameter.grad.untyped_storage()
        if storage not in self.of_gradients:
            self.of_gradients.add(storage)
            self.gradients += storage.nbytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        # `FlopCounterMode` would keep the inputs and outputs of all modules alive.
        if func._overloadpacket in FLOPS:
            self.measurement.flops += FLOPS[func._overloadpacket](*args, **kwargs, out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._free, storage.nbytes())
        kept = round(self.gradient_share * self.gradients)
        if self.live - self.gradients + kept > self.measurement.peak + self.measurement.gradients:
            self.measurement.peak, self.measurement.gradients = self.live - self.gradients, kept

    def _free(self, size: int) -> None:
        self.live -= size
