"""Adapters as PEFT methods, registered by importing this package. Requires `pip install ctkernels[adapters]`.

peft has no plug-in mechanism: a process that loads one of these adapters must import `ctkernels.adapters` first, or
peft raises `KeyError: 'JOLA'` (or `'CURVATURE'`, `'JOINT'`).
"""

from ._peft import register
from .counts import ParameterCount, count_parameters
from .curvature import CurvatureConfig, CurvatureLayer, CurvatureModel
from .curvature.model import find_activations
from .hotswap import hotswap_adapter
from .joint import JointConfig, JointModel
from .jola import JolaConfig, JolaLayer, JolaModel
from .jola.attention import FusedAttention, fuse_attention
from .jola.coverage import Coverage, coverage, print_coverage
from .jola.edit_sizes import EditReport, edit_sizes
from .jola.gate_map import GateMap, gate_map, plot_gates
from .jola.gates import drop_closed_heads, freeze_gates, open_heads
from .jola.lora import save_as_lora
from .jola.penalty import (
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
from .jola.sites import find_sites
from .jola.units import measure_units
from .monitor import (
    EditMonitor,
    PoolMonitor,
    alert_rules,
    export_opentelemetry,
    export_prometheus,
    grafana_dashboard,
)
from .optimizer import parameter_groups
from .pool import AdapterPool, PoolFullError
from .published import load_official
from .saving import save_adapter, save_merged
from .serving.gguf import save_gguf
from .serving.verify import Merged
from .strength import adapter_strength, set_strength

register("jola", JolaConfig, JolaModel)
register("curvature", CurvatureConfig, CurvatureModel)
register("joint", JointConfig, JointModel)

__all__ = [
    "AdapterPool",
    "AdaptiveSchedule",
    "ConstantSchedule",
    "Coverage",
    "CurvatureConfig",
    "CurvatureLayer",
    "CurvatureModel",
    "CyclicSchedule",
    "EditMonitor",
    "EditReport",
    "ExponentialSchedule",
    "FusedAttention",
    "GateMap",
    "JointConfig",
    "JointModel",
    "JolaConfig",
    "JolaLayer",
    "JolaModel",
    "JolaPenaltyCallback",
    "LinearSchedule",
    "Merged",
    "ParameterCount",
    "PoolFullError",
    "PoolMonitor",
    "adapter_strength",
    "add_penalty_grad",
    "alert_rules",
    "count_parameters",
    "coverage",
    "drop_closed_heads",
    "edit_sizes",
    "export_opentelemetry",
    "export_prometheus",
    "find_activations",
    "find_sites",
    "freeze_gates",
    "fuse_attention",
    "gate_map",
    "grafana_dashboard",
    "hotswap_adapter",
    "jola_penalty",
    "load_official",
    "measure_units",
    "official_penalty",
    "open_heads",
    "parameter_groups",
    "plot_gates",
    "print_coverage",
    "save_adapter",
    "save_as_lora",
    "save_gguf",
    "save_merged",
    "set_strength",
]
