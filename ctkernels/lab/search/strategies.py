"""Searches for several betas, one per group of activations: by grid, coordinate by coordinate, or with Optuna."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..._extras import require
from ..._factories import told
from ...cli.option_types import BETAS, COUNT, STORAGE, TEXT, choice, either
from .._distributed import Group
from .._progress import bar
from ..config import configured
from ..images.inputs import Images, device_of
from ..stats import preferred
from .probing import Probing, ProbingConfig, Score, probing
from .result import Comparison, Evaluation, StrategySearch

GROUPS = either(("shared", "stage", "site"), COUNT, "shared, stage, site, or a number of groups")
Point = tuple[float, ...]  # a beta per group


@dataclass(frozen=True, kw_only=True)
class StrategyConfig(ProbingConfig):
    """The configuration of :func:`search_betas`.

    Args:
        activations, margin, coeff, feature_layer, l2, seed, batch_size, folds, probe, workers: as of
            :class:`ProbingConfig`.
        betas: START:STOP:STEP with both ends, or values, in [0, 1]; 1 always takes part.
        strategy: ``"grid"``: every combination of ``betas``, from the plain network downwards. ``"coordinate"``: starting
            at the plain network, the best of ``betas`` for one group after the other, in rounds, until a round changes
            nothing. ``"bayesian"``: Optuna's tree-structured Parzen estimator, between the least and the greatest of
            ``betas``.
        groups: ``"shared"``: one beta. ``"stage"``: one per stage, a run of consecutive activations of one resolution.
            ``"site"``: one per activation. A number: so many runs of about equally many activations.
        evaluations: maximal number, including the plain network and, with ``storage``, evaluations of other workers.
        storage: for ``"bayesian"``: where Optuna keeps its trials: a file, or the URL of a database
            (``"postgresql://..."``). Processes with the same storage and study share trials, also across machines, and an
            interrupted search resumes; the order of trials, and so the result, then depends on chance. A process reports
            the best trial so far; after all have ended, another call reports the result. Default: none.
        study: name of the study in ``storage``.
    """

    betas: Annotated[Iterable[float] | str, BETAS] = "0.7:1:0.05"
    strategy: Annotated[str, choice("grid", "coordinate", "bayesian")] = "coordinate"
    groups: Annotated[str | int, GROUPS] = "stage"
    evaluations: Annotated[int, COUNT] = 60
    storage: Annotated[str | None, STORAGE] = None
    study: Annotated[str, TEXT] = "ctkernels"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.storage is not None and self.strategy != "bayesian":
            raise ValueError(f"storage is for strategy='bayesian', got strategy={self.strategy!r}")
        if self.strategy == "bayesian":
            require("optuna", "lab", "Bayesian search")

    @property
    def grid(self) -> tuple[float, ...]:
        """``betas`` and 1, descending."""
        return tuple(sorted({*super().grid, 1.0}, reverse=True))

    def arguments(self) -> dict[str, Any]:
        study = self.study if self.storage else None
        return {**super().arguments(), "betas": sorted(self.grid), "study": study}


def search_betas(
    model: nn.Module,
    train: Images,
    val: Images | float = 0.2,
    test: Images | float = 0.2,
    config: StrategyConfig | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Any,
) -> StrategySearch:
    """Chooses a beta for every group of activations of a frozen network, without training.

    Like :func:`search_beta`, but for several knobs: an evaluation sets all betas, computes features of the training and
    validation images, fits a linear probe, and counts the right answers in validation. The first evaluation is the plain
    network. The best one (the earliest among equals) is chosen if it beats the plain network by more than one standard
    error (``margin``), and is compared with it on the test images, once.

    Args:
        model, train, val, test, device: as in :func:`search_beta`.
        config: strategy, groups, betas and so on.
        progress: show a progress bar on standard error.
        options: fields of :class:`StrategyConfig`, which replace those of ``config``.

    Returns:
        :class:`StrategySearch`: every evaluation in order, the choice, the number of evaluations until it, and its test.

    Raises:
        ValueError: as in :func:`search_beta`; or the strategy or grouping is unknown, the grid has more points than
            ``evaluations``, the plain network is not beta = 1, or the study is of other data or another network.
        ImportError: scikit-learn, tqdm or Optuna is missing; the message names the extra.

    Examples:
        >>> result = search_betas(model, train, test=test, groups=2, evaluations=6, progress=False)
        >>> betas = result.chosen

    Source: Curvature Tuning paper, section 4.1, which searches one shared beta.
    """
    started = time.perf_counter()
    config = configured(StrategyConfig, config, options)
    device = device_of(model, device)
    with probing(model, (train, val, test), config, device, Group()) as search:
        steered = search.backbone.steered
        if not steered.plain_is_beta_1:
            raise ValueError(
                "search_betas needs a network that is plain at beta = 1 (the ReLU family), got one with another neutral "
                "point; choose activations, or use search_beta"
            )
        groups = _groups(model, steered.sites, search.example, config.groups)
        points = len(config.grid) ** len(groups)
        if config.strategy == "grid" and points > config.evaluations:
            raise ValueError(
                f"the grid has {len(config.grid)} ** {len(groups)} = {points} points, more than the "
                f"evaluations allowed, {config.evaluations}; give fewer betas or groups, or another strategy"
            )
        with bar(config.evaluations, config.strategy, progress) as advance:
            evaluator = _Evaluator(search, groups, config, advance)
            history = _explore(evaluator)
        plain = history[0].betas
        best = max(range(len(history)), key=lambda i: (history[i].val_accuracy, -i))
        scores = {point: evaluator.fit(point) for point in dict.fromkeys((plain, history[best].betas))}
        if not preferred([scores[plain].right, scores[history[best].betas].right], config.margin):
            best = 0
        compared = dict.fromkeys((plain, history[best].betas))
        right = [evaluator.right_on_test(point, scores[point]) for point in compared]
    return StrategySearch(
        strategy=config.strategy,
        groups={name: tuple(sites) for name, sites in groups.items()},
        history=tuple(history),
        best=best,
        test=Comparison.of(right[0], right[-1]),
        seconds=time.perf_counter() - started,
        **search.record(),
    )


@dataclass
class _Evaluator:
    """Scores points (one beta per group) on the validation images, each once."""

    search: Probing
    groups: dict[str, list[str]]
    config: StrategyConfig
    advance: Callable[[int], object]
    history: list[Evaluation] = field(default_factory=list)

    def __call__(self, point: Point) -> float:
        for evaluation in self.history:
            if evaluation.betas == point:
                return evaluation.val_accuracy
        if len(self.history) >= self.config.evaluations:
            raise _NoEvaluationsLeft
        started = time.perf_counter()
        accuracy = self.fit(point).accuracy
        self.history.append(Evaluation(point, accuracy, time.perf_counter() - started))
        self.advance(1)
        return accuracy

    def right_on_test(self, point: Point, score: Score) -> Tensor:
        """bool (n,): whether each test image is classified correctly."""
        (features,) = self.search.features("", [self._betas(point)], "test")
        return self.search.right_on_test(score, features)

    def _betas(self, point: Point) -> dict[str, float]:
        return {site: beta for beta, sites in zip(point, self.groups.values()) for site in sites}

    def fit(self, point: Point) -> Score:
        """Extracts features of the training and validation images at ``point``, and fits probes to them."""
        (score,) = self.search.fit(self.search.features("", [self._betas(point)], "train", "val"))
        return score


class _NoEvaluationsLeft(Exception):
    """Raised when the limit of evaluations is reached."""


# --- the strategies ---------------------------------------------------------------------------------------------------


def _explore(score: _Evaluator) -> list[Evaluation]:
    """Runs the strategy. Returns its evaluations, the plain network first."""
    if score.config.strategy == "bayesian":
        return _bayesian(score)
    with suppress(_NoEvaluationsLeft):
        (_grid if score.config.strategy == "grid" else _coordinate)(score)
    return score.history


def _grid(score: _Evaluator) -> None:
    for point in itertools.product(score.config.grid, repeat=len(score.groups)):
        score(point)


def _coordinate(score: _Evaluator) -> None:
    """Optimises one coordinate at a time; a value replaces another only if it is better."""
    best: Point = (1.0,) * len(score.groups)
    changed = True
    while changed:
        changed = False
        for i in range(len(best)):
            for beta in score.config.grid:
                other = (*best[:i], beta, *best[i + 1 :])
                if score(other) > score(best):
                    best, changed = other, True


def _bayesian(score: _Evaluator) -> list[Evaluation]:
    """Runs Optuna until the study has enough trials. Returns the plain network's trial, then the others in their order."""
    optuna = require("optuna", "lab", "Bayesian search")
    config, plain = score.config, (1.0,) * len(score.groups)
    highest, lowest = config.grid[0], config.grid[-1]
    names = [f"beta_{i}" for i in range(len(plain))]
    study = _study(optuna, score)
    states = optuna.trial.TrialState

    def trials(*states: Any) -> list[Any]:
        return study.get_trials(deepcopy=False, states=states)

    def of_plain(trials: Iterable[Any]) -> list[Any]:
        return [t for t in trials if t.user_attrs.get("plain") or tuple(t.params.get(n) for n in names) == plain]

    def evaluate(trial: Any) -> None:
        started = time.perf_counter()
        try:
            accuracy = score(tuple(trial.suggest_float(name, lowest, highest) for name in names))
        except BaseException:
            study.tell(trial, state=states.FAIL)
            raise
        trial.set_user_attr("seconds", time.perf_counter() - started)
        study.tell(trial, accuracy)

    # workers that start at once may all enqueue the plain network; the first of these trials counts
    if not of_plain(trials(states.COMPLETE, states.RUNNING, states.WAITING)):
        study.enqueue_trial(dict(zip(names, plain)), user_attrs={"plain": True})
    while True:
        finished = trials(states.COMPLETE)
        waiting = of_plain(trials(states.WAITING))
        if len(finished) + (not of_plain(finished) and not waiting) >= config.evaluations:
            break
        trial = study.ask()
        duplicates = of_plain(trials(states.COMPLETE, states.RUNNING)) if trial.user_attrs.get("plain") else []
        if any(t.number < trial.number for t in duplicates):
            study.tell(trial, state=states.FAIL)
        else:
            evaluate(trial)
    if not of_plain(finished):  # it is running in another worker, which may have died
        started, accuracy = time.perf_counter(), score(plain)
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(zip(names, plain)),
                distributions=dict.fromkeys(names, optuna.distributions.FloatDistribution(lowest, highest)),
                value=accuracy,
                user_attrs={"plain": True, "seconds": time.perf_counter() - started},
            )
        )
        finished = trials(states.COMPLETE)
    first = of_plain(finished)[0]
    return [
        Evaluation(tuple(t.params[n] for n in names), float(t.value), float(t.user_attrs.get("seconds", 0)))
        for t in (first, *(t for t in finished if t.number != first.number))
    ]


def _identity(score: _Evaluator) -> dict[str, Any]:
    """Everything that the accuracies of a study depend on, as plain values of JSON."""
    search, config = score.search, score.config
    settings = {name: value for name, value in config.arguments().items() if name not in _MAY_DIFFER}
    counts = {name: torch.bincount(values).tolist() for name, values in search.labels.items()}
    plain = search.backbone.features(score._betas((1.0,) * len(score.groups)))
    pixels = search.example.detach().float().cpu().contiguous().numpy().tobytes()
    values = {
        **settings,
        "betas": [config.grid[-1], config.grid[0]],
        "feature_layer": str(search.backbone.point),
        "folds": len(search.cuts),
        "groups": score.groups,
        "labels": counts,
        "first image": f"{tuple(search.example.shape)} {hashlib.sha256(pixels).hexdigest()[:16]}",
        "features": plain(search.example)[0, :16].tolist(),
    }
    return dict(json.loads(json.dumps(values)))


def _same(saved: Any, value: Any) -> bool:
    """Equality; of lists of floats within a thousandth of the largest, as machines round differently."""
    if (
        isinstance(saved, list)
        and isinstance(value, list)
        and saved
        and all(isinstance(v, float) for v in (*saved, *value))
    ):
        largest = max(map(abs, saved))
        return len(saved) == len(value) and all(abs(a - b) <= 1e-3 * largest for a, b in zip(saved, value))
    return bool(saved == value)


# Settings that do not change the accuracy of a trial.
_MAY_DIFFER = ("evaluations", "workers", "batch_size", "study", "storage", "margin", "strategy")


def _study(optuna: Any, score: _Evaluator) -> Any:
    """Opens the study in the storage, or creates it. ValueError for one of other data, another network or other settings."""
    config, identity = score.config, _identity(score)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stored = config.storage is not None
    sampler = optuna.samplers.TPESampler(seed=None if stored else config.seed, multivariate=True, constant_liar=stored)
    try:
        storage: Any = config.storage
        if config.storage is not None and "://" not in config.storage:
            # appends under a lock, so that workers may start at once
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(config.storage))
        study = optuna.create_study(
            study_name=config.study, storage=storage, sampler=sampler, direction="maximize", load_if_exists=stored
        )
        study.get_trials(deepcopy=False)
    except Exception as error:  # Optuna raises nearly anything for a damaged file, and errors of database drivers
        if not stored:
            raise
        raise ValueError(
            f"storage must be a file or database that Optuna can use, got {config.storage!r}: {told(error)}"
        ) from error
    saved = study.user_attrs.get("identity")
    if saved is not None and (differ := sorted(k for k in identity if not _same(saved.get(k), identity[k]))):
        raise ValueError(
            f"study {config.study!r} in {config.storage} is of other data, another network or other settings (different: "
            f"{differ}); go on with those it was begun with, or name another study"
        )
    study.set_user_attr("identity", identity)
    return study


# --- the groups -------------------------------------------------------------------------------------------------------


def _groups(model: nn.Module, names: Sequence[str], example: Tensor, groups: str | int) -> dict[str, list[str]]:
    sites = list(names)
    if groups == "shared":
        return {"all": sites}
    if groups == "site":
        return {site: [site] for site in sites}
    if isinstance(groups, int):
        if groups > len(sites):
            raise ValueError(f"groups must be at most the number of activations, {len(sites)}, got {groups}")
        cuts = [round(i * len(sites) / groups) for i in range(groups + 1)]
        runs = [sites[a:b] for a, b in itertools.pairwise(cuts)]
    else:
        runs = _stages(model, sites, example)
    return {f"{i + 1}: {run[0]}" + (f" to {run[-1]}" if len(run) > 1 else ""): run for i, run in enumerate(runs)}


def _stages(model: nn.Module, sites: list[str], example: Tensor) -> list[list[str]]:
    """Groups consecutive sites whose inputs have the same resolution (height times width, or tokens)."""
    resolutions: dict[str, int] = {}
    hooks = []
    for site in sites:
        # "layer1.0.relu" is a module; "aux1.forward:relu" a call in the code of the module aux1
        owner, colon, _ = site.partition(":")
        if colon:
            owner = owner.rpartition(".")[0]

        def record(_: nn.Module, inputs: tuple[Any, ...], site: str = site) -> None:
            x = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            if x is not None and site not in resolutions:
                shape = x.shape[2:] if x.dim() != 3 else x.shape[1:2]
                resolutions[site] = math.prod(shape)

        hooks.append(model.get_submodule(owner).register_forward_pre_hook(record))
    try:
        with torch.inference_mode():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    runs: list[list[str]] = []
    last: int | None = None
    for site in sites:
        size = resolutions.get(site, last)
        if runs and size == last:
            runs[-1].append(site)
        else:
            runs.append([site])
        last = size
    return runs
