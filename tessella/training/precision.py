"""Which number format a device computes natively."""

from __future__ import annotations

import logging
import time
from functools import cache
from pathlib import Path
from typing import Literal

import torch

logger = logging.getLogger("tessella")

Precision = Literal["auto", "fp32", "bf16"]

# Flags of processors that multiply bfloat16 matrices: AVX512-BF16, AMX, and ARM's.
_NATIVE_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_SIDE = 512


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """``precision`` with ``auto`` decided: bf16 where the device computes it natively, else fp32.

    An explicit bf16 on a device that has to imitate it is kept, with a warning that says how much slower it is.
    """
    native = computes_bf16(device)
    if precision == "auto":
        chosen: Literal["fp32", "bf16"] = "bf16" if native else "fp32"
        reason = "computes" if native else "does not compute"
        logger.info("precision %s: %s %s bf16 natively", chosen, device, reason)
        return chosen
    if precision == "bf16" and not native:
        logger.warning(
            "precision bf16: %s does not compute it natively, a matrix product takes %.2g times as long as in fp32; "
            "precision = \"auto\" would choose fp32", device, 1 / _speed(device.type),
        )  # fmt: skip
    return precision


def computes_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices by itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(_NATIVE_FLAGS & set(_processor_flags()))
    return device.type in ("xpu", "hpu")


@cache
def _processor_flags() -> tuple[str, ...]:
    """As Linux tells them; elsewhere none are known, and fp32 is right everywhere."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return ()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return tuple(next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


@cache
def _speed(device_type: str) -> float:
    """How fast bf16 matrix products are there, fp32 being 1."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device_type)
        times = []
        for _ in range(4):  # the first one warms up
            started = time.perf_counter()
            (a @ a)[0, 0].item()
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times[1:])
    return seconds[torch.float32] / seconds[torch.bfloat16]
