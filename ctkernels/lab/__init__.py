"""The laboratory: the papers' protocols, searches, comparisons and reports. It needs ``ctkernels[lab]``.

The rest of the package never imports it.
"""

from .analysis import ProfileConfig, curvature_profile, run_toys
from .config import DEFAULT_BETAS
from .executor import LocalExecutor, RayExecutor
from .images.data import load_data, read_folder, read_npz
from .images.models import load_model
from .images.probe import Probe, fit_probe
from .images.sets import ImageSet, Preprocess, Splits, normalised_like, stratified_order, stratified_split
from .jola import MethodsConfig, compare_methods
from .robustness.evaluate import RobustnessConfig, robustness
from .search.grid import SearchConfig, search_beta
from .search.result import BetaSearch, Comparison, plot, verdict
from .search.strategies import StrategyConfig, search_betas
from .streaming import Router, StreamResult, stream
from .transfer import TransferConfig, TuneConfig, compare_transfer, tune_curvature

__all__ = [
    "DEFAULT_BETAS",
    "BetaSearch",
    "Comparison",
    "ImageSet",
    "LocalExecutor",
    "MethodsConfig",
    "Preprocess",
    "Probe",
    "ProfileConfig",
    "RayExecutor",
    "RobustnessConfig",
    "Router",
    "SearchConfig",
    "Splits",
    "StrategyConfig",
    "StreamResult",
    "TransferConfig",
    "TuneConfig",
    "compare_methods",
    "compare_transfer",
    "curvature_profile",
    "fit_probe",
    "load_data",
    "load_model",
    "normalised_like",
    "plot",
    "read_folder",
    "read_npz",
    "robustness",
    "run_toys",
    "search_beta",
    "search_betas",
    "stratified_order",
    "stratified_split",
    "stream",
    "tune_curvature",
    "verdict",
]
