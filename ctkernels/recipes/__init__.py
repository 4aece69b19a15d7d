"""The papers' protocols as functions: what they need beyond torch is in the extra ``ctkernels[recipes]``."""

from ._inputs import DEFAULT_BETAS
from .data import fashion_mnist, load_data, read_folder, read_npz
from .images import ImageSet, Preprocess, Splits, normalised_like, stratified_order, stratified_split
from .models import load_model
from .picture import plot
from .probe import Probe, fit_probe
from .result import BetaSearch, Comparison, verdict
from .search import search_beta

__all__ = [
    "DEFAULT_BETAS",
    "BetaSearch",
    "Comparison",
    "ImageSet",
    "Preprocess",
    "Probe",
    "Splits",
    "fashion_mnist",
    "fit_probe",
    "load_data",
    "load_model",
    "normalised_like",
    "plot",
    "read_folder",
    "read_npz",
    "search_beta",
    "stratified_order",
    "stratified_split",
    "verdict",
]
