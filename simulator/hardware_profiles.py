"""Links and GPUs by name, as their vendors describe them. Declared, never measured here.

Rates are the vendors' own, for dense 16-bit arithmetic with 32-bit accumulation (no sparsity). A GB of
bandwidth is 10⁹ bytes; a GB of device memory is 2³⁰, which is what the devices report.
"""

from __future__ import annotations

from dataclasses import dataclass

ACHIEVABLE_SHARE = 0.8
"""Declared share of a link's rate that large copies from page-locked memory reach."""

LINK_LATENCY_S = 10e-6
"""Declared time of one copy beside its bytes: launch and completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredLink:
    """One direction of a link from host to device."""

    name: str
    bandwidth_Bps: float
    latency_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredGpu:
    """One GPU. `device` is words of the name under which tables of measurements know it."""

    name: str
    device: str
    memory_Bps: float
    flops: float
    memory_bytes: int
    source: str


def _pcie(generation: int, lanes: int, transfers_per_s: float) -> DeclaredLink:
    rate = transfers_per_s * lanes * (128 / 130) / 8
    return DeclaredLink(
        name=f"pcie{generation}x{lanes}",
        bandwidth_Bps=ACHIEVABLE_SHARE * rate,
        latency_s=LINK_LATENCY_S,
        source=(
            f"PCI-SIG PCI Express {generation}.0, {lanes} lanes at {transfers_per_s / 1e9:.0f} GT/s, "
            f"128b/130b: {rate / 1e9:.1f} GB/s per direction, times a declared achievable share of "
            f"{ACHIEVABLE_SHARE}; latency declared"
        ),
    )


_LINKS = (
    *(
        _pcie(generation, lanes, rate)
        for generation, rate in ((3, 8e9), (4, 16e9), (5, 32e9))
        for lanes in (8, 16)
    ),
    DeclaredLink(
        name="nvlink-c2c",
        bandwidth_Bps=ACHIEVABLE_SHARE * 450e9,
        latency_s=LINK_LATENCY_S,
        source=(
            "NVIDIA GH200 Grace Hopper datasheet: NVLink-C2C, 450 GB/s per direction, times a declared "
            f"achievable share of {ACHIEVABLE_SHARE}; latency declared"
        ),
    ),
)


def _gpu(
    name: str, device: str, memory_GBps: float, tflops: float, memory_GB: int, source: str
) -> DeclaredGpu:
    return DeclaredGpu(
        name=name,
        device=device,
        memory_Bps=memory_GBps * 1e9,
        flops=tflops * 1e12,
        memory_bytes=memory_GB << 30,
        source=source,
    )


_AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper"
_GPUS = (
    _gpu("t4", "T4", 320, 65, 16, "NVIDIA T4 datasheet (float16; it has no bfloat16)"),
    _gpu(
        "v100-sxm2-32gb", "V100-SXM2-32GB", 900, 125, 32,
        "NVIDIA V100 datasheet, SXM2 (float16; it has no bfloat16)",
    ),
    _gpu("a10", "A10", 600, 125, 24, "NVIDIA A10 datasheet"),
    _gpu("a40", "A40", 696, 149.7, 48, "NVIDIA A40 datasheet"),
    _gpu("a100-40gb", "A100-SXM4-40GB", 1555, 312, 40, "NVIDIA A100 datasheet, 40 GB"),
    _gpu("a100-80gb", "A100-SXM4-80GB", 2039, 312, 80, "NVIDIA A100 datasheet, 80 GB SXM"),
    _gpu("l40s", "L40S", 864, 362.05, 48, "NVIDIA L40S datasheet"),
    _gpu("h100-sxm", "H100 80GB HBM3", 3350, 989.4, 80, "NVIDIA H100 datasheet, SXM"),
    _gpu("h200", "H200", 4800, 989.4, 141, "NVIDIA H200 datasheet, SXM"),
    _gpu("rtx3090", "RTX 3090", 936, 71, 24, f"{_AMPERE}, GeForce RTX 3090"),
    _gpu("rtx-a6000", "RTX A6000", 768, 154.8, 48, "NVIDIA RTX A6000 datasheet"),
    _gpu(
        "rtx4090", "RTX 4090", 1008, 165.2, 24,
        "NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090",
    ),
    _gpu("rtx5090", "RTX 5090", 1792, 209.5, 32, f"{_BLACKWELL}, GeForce RTX 5090"),
    _gpu(
        "rtx-pro-6000", "RTX PRO 6000", 1792, 503.8, 96,
        "NVIDIA RTX Blackwell PRO GPU architecture whitepaper, Workstation Edition",
    ),
)  # fmt: skip

LINKS = {link.name: link for link in _LINKS}
GPUS = {gpu.name: gpu for gpu in _GPUS}

BITS_PER_WEIGHT = {
    "float32": 32.0,
    "bfloat16": 16.0,
    "float16": 16.0,
    "float8_e4m3fn": 8.0,
    "fp8": 8.0,
    "int8": 8.0,
    "nvfp4": 4.5,
    "mxfp4": 4.25,
    "int4": 4.125,
}
"""Bits of one stored weight with its scales: 8 for 16 weights (nvfp4), for 32 (mxfp4); 16 for 128 (int4)."""
