"""GPUs from their data sheets, and the predicted time of a kernel on one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU. SMs, clock and bandwidth are from data sheets of the SXM parts, lanes per clock and SM of each pipe from the
    throughput table of the CUDA C++ programming guide for its compute capability. The clock is a sustained one."""

    name: str
    sms: int
    ghz: float
    gigabytes: float
    fp32: int
    fp64: int

    def clocks(self, cost: Cost) -> dict[str, float]:
        """SM clocks per element, by limiting resource."""
        lanes = {"issue": 128, "mufu": 16, "fp32": self.fp32, "fp64": self.fp64, "convert": 64, "other": 64}
        work = {"issue": cost.instructions, **{k: cost.pipes.get(k, 0.0) for k in lanes if k != "issue"}}
        return {"memory": cost.bytes / (self.gigabytes / self.sms / self.ghz), **{k: work[k] / lanes[k] for k in lanes}}


GPUS = {
    80: Gpu("A100", 108, 1.41, 2039, fp32=64, fp64=32),
    90: Gpu("H100", 132, 1.755, 3350, fp32=128, fp64=64),
    100: Gpu("B200", 148, 1.85, 8000, fp32=128, fp64=64),
}


@dataclass(frozen=True)
class Cost:
    """A kernel on one architecture; instructions and bytes are per element of its hot loop."""

    variant: str
    sm: int
    ours: bool
    bytes: float
    instructions: float
    pipes: dict[str, float]
    vector: int
    registers: int
    stack: int
    spills: int
    calls: int
    warps: int
    ratio: float
    limit: str
