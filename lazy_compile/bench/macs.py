"""Multiplications that a model really does: one counter for every package that skips some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten


class MacCounter(TorchDispatchMode):
    """Counts the multiply-accumulates of matrix products, attention and convolutions that run while it is entered.

    It sees every operator that is dispatched, whoever called it, and so takes no package's word for what was skipped.
    What is done element by element (norms, activations, extrapolation) does not count.

    Attributes:
        macs: what was counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            query, key, value, *_ = args
            self.macs += sdpa_flop_count(query.shape, key.shape, value.shape) // 2
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.macs += formula(*args, **(kwargs or {}), out_val=result) // 2
        return result


def counted(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a function returns, and the multiply-accumulates that it did."""
    with MacCounter() as counter:
        result = run()
    return result, counter.macs
