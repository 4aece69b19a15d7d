"""The laboratory: the papers' protocols, searches, comparisons and reports. It needs ``ctkernels[lab]``.

The rest of the package never imports it.
"""

from .analysis import ProfileConfig, curvature_profile, run_toys
from .config import DEFAULT_BETAS
from .data import load_data
from .executor import LocalExecutor, RayExecutor
from .images.data import read_folder, read_npz
from .images.models import load_model
from .images.probe import Probe, fit_probe
from .images.sets import ImageSet, Preprocess, normalised_like
from .jola import MethodsConfig, compare_methods
from .labelled import LabelledSet, Splits, stratified_order, stratified_split
from .robustness.evaluate import RobustnessConfig, robustness
from .search.grid import SearchConfig, search_beta
from .search.result import BetaSearch, Comparison, plot, verdict
from .search.strategies import StrategyConfig, search_betas
from .series import SeriesSet, read_series
from .streaming import Router, StreamResult, stream
from .texts import TextEncoder, TextSet, load_encoder
from .transfer import TransferConfig, TuneConfig, compare_transfer, tune_curvature

__all__ = [
    "DEFAULT_BETAS",
    "BetaSearch",
    "Comparison",
    "ImageSet",
    "LabelledSet",
    "LocalExecutor",
    "MethodsConfig",
    "Preprocess",
    "Probe",
    "ProfileConfig",
    "RayExecutor",
    "RobustnessConfig",
    "Router",
    "SearchConfig",
    "SeriesSet",
    "Splits",
    "StrategyConfig",
    "StreamResult",
    "TextEncoder",
    "TextSet",
    "TransferConfig",
    "TuneConfig",
    "compare_methods",
    "compare_transfer",
    "curvature_profile",
    "fit_probe",
    "load_data",
    "load_encoder",
    "load_model",
    "normalised_like",
    "plot",
    "read_folder",
    "read_npz",
    "read_series",
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
