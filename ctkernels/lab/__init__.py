"""The laboratory: the papers' protocols, searches, comparisons and reports. It needs ``ctkernels[lab]``.

The rest of the package never imports it.
"""

from .betas import DEFAULT_BETAS
from .images.data import fashion_mnist, load_data, read_folder, read_npz
from .images.models import load_model
from .images.probe import Probe, fit_probe
from .images.sets import ImageSet, Preprocess, Splits, normalised_like, stratified_order, stratified_split
from .search.grid import search_beta
from .search.plot import plot
from .search.result import BetaSearch, Comparison, verdict

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
