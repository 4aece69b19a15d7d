"""Adapters as PEFT methods; importing this package registers them. It needs `pip install ctkernels[adapters]`.

peft has no plug-in mechanism: a process that loads one of these adapters must import `ctkernels.adapters` first, or
peft raises `KeyError: 'JOLA'` (or `'CURVATURE'`).
"""

from ._peft import register
from .attention import FusedAttention, fuse_attention
from .curvature import CurvatureConfig, CurvatureLayer, CurvatureModel
from .curvature.model import find_activations
from .gates import drop_closed_heads, freeze_gates, open_heads
from .jola import JolaConfig, JolaLayer, JolaModel
from .jola.coverage import Coverage, coverage, print_coverage
from .monitor import EditMonitor
from .official import load_official
from .optimizer import parameter_groups
from .penalty import (
    AdaptiveSchedule,
    ConstantSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    JolaPenaltyCallback,
    LinearSchedule,
    add_penalty_grad,
    jola_penalty,
    official_penalty,
)
from .saving import save_adapter, save_merged
from .sites import find_sites

register("jola", JolaConfig, JolaModel)
register("curvature", CurvatureConfig, CurvatureModel)

__all__ = [
    "AdaptiveSchedule",
    "ConstantSchedule",
    "Coverage",
    "CurvatureConfig",
    "CurvatureLayer",
    "CurvatureModel",
    "CyclicSchedule",
    "EditMonitor",
    "ExponentialSchedule",
    "FusedAttention",
    "JolaConfig",
    "JolaLayer",
    "JolaModel",
    "JolaPenaltyCallback",
    "LinearSchedule",
    "add_penalty_grad",
    "coverage",
    "drop_closed_heads",
    "find_activations",
    "find_sites",
    "freeze_gates",
    "fuse_attention",
    "jola_penalty",
    "load_official",
    "official_penalty",
    "open_heads",
    "parameter_groups",
    "print_coverage",
    "save_adapter",
    "save_merged",
]
