"""Searching beta beyond one shared grid: a beta per stage or site, by coordinates or with Optuna."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._extras import require
from ..._factories import told
from .._distributed import Group
from .._progress import bar
from ..betas import Images, check_betas, check_labels, check_numbers, device_of, example_of, split
from ..images.probe import Probe, check_probe, fit_probe
from .reading import Reader, Subject, evaluation, subject_of
from .result import Comparison
from .strategy_result import Evaluation, StrategySearch

STRATEGIES = ("grid", "coordinate", "bayesian")
GROUPS = ("shared", "stage", "site")
Score = Callable[[tuple[float, ...]], float]


def search_betas(
    model: nn.Module,
    train: Images,
    val: Images | float = 0.2,
    test: Images | float = 0.2,
    *,
    strategy: str = "coordinate",
    groups: str | int = "stage",
    betas: Iterable[float] | None = None,
    evaluations: int = 60,
    coeff: float = 0.5,
    activations: Iterable[str] | None = None,
    feature_layer: str | None = None,
    l2: float = 0.01,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str | None = None,
    storage: str | None = None,
    study: str = "ctkernels",
    progress: bool = True,
) -> StrategySearch:
    """Choose a beta for every group of activations of a frozen network, without training it.

    As :func:`search_beta`, but for more than one knob: an evaluation sets all betas, computes features of the training
    and validation images, fits a linear probe, and counts what it gets right in validation. The first evaluation is the
    plain network; the best one is chosen, the earliest among equals, and compared with the plain network on the test
    images, once.

    Args:
        model, train, val, test: as in :func:`search_beta`.
        strategy: ``"grid"``: every combination of ``betas``, from the plain network downwards. ``"coordinate"``: from the
            plain network on, the best of ``betas`` for one group after the other, round after round, until a whole round
            changes nothing. ``"bayesian"``: Optuna's tree-structured Parzen estimator, anywhere between the least and the
            greatest of ``betas``.
        groups: ``"shared"``: one beta. ``"stage"``: one per stage, that is per run of consecutive activations of one
            resolution. ``"site"``: one per activation. A number: so many runs of about equally many activations.
        betas: in [0, 1]. Default 0.70 to 1.00 in steps of 0.01. 1 always takes part.
        evaluations: at most so many, the plain network and, with ``storage``, those of other workers included.
        coeff: the mixing coefficient c of the CT unit, in [0, 1].
        activations, feature_layer, l2, batch_size, workers, device: as in :func:`search_beta`.
        seed: of the split, and of Optuna's sampler.
        storage: for ``"bayesian"``: where Optuna keeps its trials: a file, or the URL of a database
            (``"postgresql://..."``). Processes with the same storage and study share them, on one machine or on many, and
            a run that was cut off goes on; their order, and so the result, then depends on chance. What a process reports
            is the best so far; once all have ended, another call evaluates nothing and gives the result.
        study: name of the study in ``storage``.
        progress: show a bar on standard error.

    Returns:
        :class:`StrategySearch`: every evaluation in order, the choice, how many evaluations it took, and its test.

    Raises:
        ValueError: as :func:`search_beta`; an unknown strategy or grouping; a grid larger than ``evaluations``; a network
            whose plain form is not beta = 1; a study of other data or another network.
        ImportError: scikit-learn, tqdm or Optuna is missing; the message names the extra.

    Example:
        >>> result = search_betas(model, train, test=test, groups=3, evaluations=40)  # doctest: +SKIP
        >>> result.chosen, result.reached  # doctest: +SKIP

    Source: Curvature Tuning paper, section 4.1, which searches one shared beta.
    """
    started = time.perf_counter()
    grid = sorted(check_betas(betas) | {1.0}, reverse=True)
    check_numbers(coeff=coeff, batch_size=batch_size, workers=workers, memory_limit=1)
    check_probe("logistic", l2)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {strategy!r}")
    if groups not in GROUPS and not (isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1):
        raise ValueError(f"groups must be one of {list(GROUPS)} or a number of at least 1, got {groups!r}")
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}")
    if storage is not None and strategy != "bayesian":
        raise ValueError(f"storage is for strategy='bayesian', got strategy={strategy!r}")
    if strategy == "bayesian":
        require("optuna", "lab", "Bayesian search")
    steering: dict[str, Any] = {"coeff": coeff}
    if activations is not None:
        steering["activations"] = tuple(activations)
    images, fractions = split(train, val, test, seed)
    labels = check_labels(images)
    place = device_of(model, device)
    with (
        evaluation(model.to(place)),
        subject_of(model, example := example_of(images["train"], place), feature_layer, steering, fast=True) as subject,
    ):
        if not subject.plain_is_beta_1:
            raise ValueError(
                "search_betas needs a network that is plain at beta = 1 (the ReLU family), got one with another neutral "
                "point; choose activations, or use search_beta"
            )
        named = _groups(model, subject, example, groups)
        if strategy == "grid" and len(grid) ** len(named) > evaluations:
            raise ValueError(
                f"the grid has {len(grid)} ** {len(named)} = {len(grid) ** len(named)} points, more than the "
                f"evaluations allowed, {evaluations}; give fewer betas or groups, or another strategy"
            )
        reader = Reader(subject, Group(), place, batch_size, workers, False)
        history: list[Evaluation] = []
        seen: dict[tuple[float, ...], float] = {}
        n = len(labels["train"])

        def setting(point: Sequence[float]) -> Any:
            return {site: beta for beta, sites in zip(point, named.values()) for site in sites}

        def fit(point: Sequence[float]) -> tuple[Probe, Tensor]:
            features = reader("", [images["train"], images["val"]], [setting(point)])[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about convergence
                return fit_probe(features[:n], labels["train"], "logistic", l2, seed), features[n:]

        def score(point: tuple[float, ...]) -> float:
            if point not in seen:
                if len(history) >= evaluations:
                    raise _Spent
                begun = time.perf_counter()
                probe, rest = fit(point)
                seen[point] = float((probe.predict(rest) == labels["val"]).double().mean())
                history.append(Evaluation(point, seen[point], time.perf_counter() - begun))
                advance(1)
            return seen[point]

        plain = (1.0,) * len(named)
        with bar(evaluations, strategy, progress) as advance:
            try:  # each of these begins with the plain network
                if strategy == "grid":
                    _grid(score, grid, len(named))
                elif strategy == "coordinate":
                    _coordinate(score, grid, len(named))
            except _Spent:
                pass
            if strategy == "bayesian":
                identity = {"groups": {k: list(v) for k, v in named.items()}, "labels": _digest(labels), "seed": seed}
                history = _bayesian(score, grid, plain, evaluations, seed, storage, study, identity)
        best = max(range(len(history)), key=lambda i: (history[i].val_accuracy, -i))
        chosen = history[best].betas
        right = []
        for point in dict.fromkeys((plain, chosen)):
            probe, _ = fit(point)
            right.append(probe.predict(reader("", [images["test"]], [setting(point)])[0]) == labels["test"])
        outcome = Comparison.of(right[0], right[-1])
        sites, missed, layer = subject.sites, subject.missed, str(subject.tap)
    return StrategySearch(
        strategy=strategy,
        groups={name: tuple(found) for name, found in named.items()},
        history=tuple(history),
        best=best,
        test=outcome,
        sites=sites,
        missed=missed,
        feature_layer=layer,
        arguments={
            "groups": groups,
            "betas": sorted(grid),
            "evaluations": evaluations,
            "coeff": coeff,
            "activations": None if activations is None else list(steering["activations"]),
            "feature_layer": feature_layer,
            "l2": l2,
            "seed": seed,
            "batch_size": batch_size,
            "workers": workers,
            "device": str(place),
            "storage": storage,
            "study": study if storage else None,
            **fractions,
        },
        sizes={
            **{name: len(data) for name, data in labels.items()},
            "classes": int(labels["train"].max()) + 1,
            "features": subject.dim,
        },
        seconds=time.perf_counter() - started,
    )


class _Spent(Exception):
    """All evaluations are used up."""


# --- the strategies ---------------------------------------------------------------------------------------------------


def _grid(score: Score, grid: Sequence[float], dims: int) -> None:
    points: list[tuple[float, ...]] = [()]
    for _ in range(dims):
        points = [(*p, beta) for p in points for beta in grid]
    for point in points:
        score(point)


def _coordinate(score: Score, grid: Sequence[float], dims: int) -> None:
    """The best value of one coordinate at a time; a value replaces another only if it is better."""
    here = [1.0] * dims
    changed = True
    while changed:
        changed = False
        for i in range(dims):
            at = score(tuple(here))
            for beta in grid:
                there = (*here[:i], beta, *here[i + 1 :])
                if score(there) > at:
                    at, here, changed = score(there), list(there), True


def _bayesian(
    score: Score,
    grid: Sequence[float],
    plain: tuple[float, ...],
    evaluations: int,
    seed: int,
    storage: str | None,
    study: str,
    identity: dict[str, Any],
) -> list[Evaluation]:
    """Run Optuna until the study has so many trials; the plain network's, then the others in the order they began."""
    optuna = require("optuna", "lab", "Bayesian search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = [f"beta_{i}" for i in range(len(plain))]
    sampler = optuna.samplers.TPESampler(seed=None if storage else seed, multivariate=True, constant_liar=bool(storage))
    try:
        place: Any = storage
        if storage is not None and "://" not in storage:  # appended to under a lock: workers may start at once
            place = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
        made = optuna.create_study(
            study_name=study, storage=place, sampler=sampler, direction="maximize", load_if_exists=storage is not None
        )
        made.get_trials(deepcopy=False)
    except Exception as error:  # a damaged file makes Optuna raise nearly anything, a database what its driver does
        if storage is None:
            raise
        raise ValueError(
            f"storage must be a file or database that Optuna can use, got {storage!r}: {told(error)}"
        ) from error
    known = made.user_attrs.get("identity")
    if known is not None and known != identity:
        differ = sorted(k for k in identity if known.get(k) != identity[k])
        raise ValueError(f"study {study!r} in {storage} is of other data or another network (different: {differ})")
    made.set_user_attr("identity", identity)
    states = optuna.trial.TrialState

    def trials(*wanted: Any) -> list[Any]:
        return made.get_trials(deepcopy=False, states=wanted)

    def of_plain(found: Iterable[Any]) -> list[Any]:
        return [t for t in found if t.user_attrs.get("plain") or tuple(t.params.get(n) for n in names) == plain]

    def evaluate(trial: Any) -> None:
        begun = time.perf_counter()
        try:
            accuracy = score(tuple(trial.suggest_float(name, grid[-1], grid[0]) for name in names))
        except BaseException:
            made.tell(trial, state=states.FAIL)
            raise
        trial.set_user_attr("seconds", time.perf_counter() - begun)
        made.tell(trial, accuracy)

    # Workers that start at once may all enqueue the plain network; the first of these trials is the one that counts.
    if not of_plain(trials(states.COMPLETE, states.RUNNING, states.WAITING)):
        made.enqueue_trial(dict(zip(names, plain)), user_attrs={"plain": True})
    while True:
        done = trials(states.COMPLETE)
        waiting = of_plain(trials(states.WAITING))
        if len(done) + (not of_plain(done) and not waiting) >= evaluations:
            break
        trial = made.ask()
        others = of_plain(trials(states.COMPLETE, states.RUNNING)) if trial.user_attrs.get("plain") else []
        if any(t.number < trial.number for t in others):
            made.tell(trial, state=states.FAIL)
        else:
            evaluate(trial)
    if not of_plain(done):  # another worker has it, and may have died in it
        begun, accuracy = time.perf_counter(), score(plain)
        made.add_trial(
            optuna.trial.create_trial(
                params=dict(zip(names, plain)),
                distributions={n: optuna.distributions.FloatDistribution(grid[-1], grid[0]) for n in names},
                value=accuracy,
                user_attrs={"plain": True, "seconds": time.perf_counter() - begun},
            )
        )
        done = trials(states.COMPLETE)
    first = of_plain(done)[0]
    return [
        Evaluation(tuple(t.params[n] for n in names), float(t.value), float(t.user_attrs.get("seconds", 0)))
        for t in (first, *(t for t in done if t.number != first.number))
    ]


def _digest(labels: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """How many of each class each part has: enough to notice other data."""
    return {name: torch.bincount(found).tolist() for name, found in labels.items()}


# --- the groups -------------------------------------------------------------------------------------------------------


def _groups(model: nn.Module, subject: Subject, example: Tensor, groups: str | int) -> dict[str, list[str]]:
    sites = list(subject.sites)
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
    """Consecutive sites whose inputs have one number of places (height times width, tokens)."""
    places: dict[str, int] = {}
    hooks = []
    for site in sites:
        # "layer1.0.relu" is a module; "aux1.forward:relu" a call in the code of the module aux1
        owner = site.partition(":")[0]
        if ":" in site:
            owner = owner.rpartition(".")[0]

        def note(_: nn.Module, inputs: tuple[Any, ...], site: str = site) -> None:
            x = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            if x is not None and site not in places:
                shape = x.shape[2:] if x.dim() != 3 else x.shape[1:2]
                places[site] = math.prod(shape)

        hooks.append(model.get_submodule(owner).register_forward_pre_hook(note))
    try:
        with torch.inference_mode():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    runs: list[list[str]] = []
    last: int | None = None
    for site in sites:
        size = places.get(site, last)
        if runs and size == last:
            runs[-1].append(site)
        else:
            runs.append([site])
        last = size
    return runs
