"""The protocol: per method choose a setting on the first seed's validation, train on every seed, test once."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._extras import require
from .._distributed import Group, group
from .._progress import bar
from .._weights import damage, read_weights, save_weights
from ..betas import check_betas
from ..images.sets import Splits
from ..search.reading import evaluation
from .frozen import Frozen
from .heads import Budget, Run, rank, with_head
from .inputs import Draw, ImageOptions, Models, check_data, check_model, draw
from .methods import Attached, Method, method
from .result import Cell, Setting, TransferComparison, describe, display, resumed
from .soundness import sound, title, weights_path
from .state import load_state

DEFAULT_METHODS = ("linear", "sct", "lora-r1", "tct", "tct+lora-r1")
BN_MODES = ("eval", "train", "paper")
PAPER_SEEDS = (42, 43, 44)


def compare_transfer(
    models: Models,
    data: Mapping[str, Splits],
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: Sequence[int] = PAPER_SEEDS,
    betas: Iterable[float] | None = None,
    grids: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    budget: Budget | None = None,
    bn: str = "eval",
    images: ImageOptions | None = None,
    activations: Iterable[str] | None = None,
    precision: str = "no",
    cpu: bool = False,
    workers: int = 0,
    memory_limit: int = 2 << 30,
    out: str | PathLike[str] | None = None,
    progress: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> TransferComparison:
    """Compare ways to adapt pretrained image classifiers to new data: the tables of the Curvature Tuning paper.

    Every method trains a new linear head with the same schedule, from the same initial weights, and keeps the epoch
    with the best validation accuracy. ``linear`` does so on frozen features; ``sct`` on frozen features at every beta,
    of which validation chooses one; ``lora-rN`` trains LoRA of rank N on every convolution and linear layer as well
    (peft); ``tct`` a beta and a coefficient per channel of every activation; ``tct+lora-rN`` both;
    ``sct-mean-free`` is ``sct`` with the coefficient beta^2 / (1 + beta^2) in place of 0.5. Dropout is off throughout,
    so that frozen features are what the network gives in training.

    Where a method's grid has several settings, each is trained on the first seed, and the one with the best validation
    accuracy is used for all seeds. The test images, the same for every seed, are read once per chosen run.

    With ``out``, every finished run is kept in ``out/result.json`` and its weights in ``out/weights``; a call that was
    cut short goes on from there, and models, data sets, methods and seeds can be added. Training runs on accelerate:
    on this process's GPU or the CPU; under ``torchrun`` every step's batch is dealt to the processes.

    Args:
        models: networks by name, or functions that build them; pretrained, and left as they were.
        data: :class:`Splits` by name, such as :func:`load_data` gives.
        methods: which, in the order of the table.
        seeds: of validation splits, samples, initial weights and order. The first also chooses settings.
        betas: for S-CT; default 0.70 to 1.00 in steps of 0.01. The plain network always takes part.
        grids: values to try instead of the paper's: ``{"tct": {"lr": [0.1, 0.01]}, "lora-r1": {"lr": [1e-3]}}``.
        budget: epochs and batch size.
        bn: batch normalisation. ``"eval"``: the statistics of pretraining, for every method. ``"train"``: of the new
            data, for every method: batch statistics while a network is trained, and for frozen networks the mean over
            the training images, at every beta. ``"paper"``: as its code has it, ``"eval"`` for the frozen networks and
            ``"train"`` for the others.
        images: how images are made ready and split.
        activations: kinds to treat; default :func:`ctkernels.steer`'s.
        precision: "no", "bf16" or "fp16", accelerate's mixed precision; frozen features are always float32.
        cpu: whether to leave GPUs alone.
        workers: processes that decode images.
        memory_limit: bytes for prepared images, and again for features, kept at once.
        out: folder for results. Default: nothing is kept.
        progress: show a bar on standard error.
        extra: more entries for the result file.

    Raises:
        ValueError: before any long work: an unknown method, a grid that does not fit, no seeds, a data set that cannot
            be split or has one class or NaN, a network without an activation or that does not take the images, results
            of another set-up in ``out``.
        ImportError: accelerate, peft or tqdm is missing; the message names the extra.

    Example:
        >>> models = {"resnet18": lambda: load_model("resnet18")}  # doctest: +SKIP
        >>> result = compare_transfer(models, {"flowers": load_data("flowers/")}, out="out")  # doctest: +SKIP
        >>> print(result.table())  # doctest: +SKIP

    Source: Curvature Tuning paper, section 4 and appendix B. Unlike its code: LoRA's rank is a method of its own and
    nothing is chosen on test images; every method keeps its best validation epoch; batch normalisation is alike.
    """
    started = time.perf_counter()
    options, budget = images or ImageOptions(), budget or Budget()
    chosen = _check(models, data, methods, seeds, grids or {}, bn, precision)
    grid = sorted(check_betas(betas))
    kinds = None if activations is None else tuple(activations)
    from .training import make_accelerator

    accelerator = make_accelerator(precision, cpu)
    us = group(accelerator.device)
    if budget.batch_size % us.size:
        raise ValueError(f"batch_size must be a multiple of the {us.size} processes, got {budget.batch_size}")
    wanted = [m for m, _ in chosen]
    setup: dict[str, Any] = {
        "models": {n: check_model(n, _built(m), wanted, options.size, kinds) for n, m in models.items()},
        "data": {n: check_data(n, splits, options, seeds) for n, splits in data.items()},
        "methods": {m.name: settings for m, settings in chosen},
        "seeds": list(dict.fromkeys(seeds)),
        "betas": grid,
        "budget": asdict(budget),
        "bn": bn,
        "images": asdict(options),
        "activations": kinds and list(kinds),
        "precision": precision,
        "processes": us.size,
    }
    folder = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with folder as own, ExitStack() as stack:
        path = Path(us.share(own))
        file = path / "result.json"
        result, told = us.share(
            sound(resumed(file, setup), path) if us.rank == 0 else (TransferComparison((), setup), [])
        )
        for sentence in told if us.rank == 0 else ():
            warnings.warn(f"{file}: {sentence}", stacklevel=2)

        def keep(cell: Cell) -> None:
            nonlocal result
            others = tuple(c for c in result.cells if c.key != cell.key)
            result = replace(result, cells=(*others, cell), seconds=time.perf_counter() - started)
            if us.rank == 0:
                result.save(file, **(extra or {}))

        for name, source in models.items():
            model: nn.Module | None = None  # built when it is needed, as a finished comparison needs none
            for data_name, splits in data.items():
                draws: dict[int, Draw] = {}
                for number, (m, settings) in enumerate(chosen):
                    todo = _Todo(name, data_name, m, settings, seeds, lambda: result, keep)
                    if todo.finished():
                        continue
                    if model is None:
                        model = stack.enter_context(evaluation(_built(source).to(accelerator.device)))
                    text = f"{name}, {data_name}, {number + 1} of {len(chosen)}, {display(m.name)}"
                    work = _Work(
                        model, len(splits.train.classes), accelerator, us, budget, bn, grid, kinds, workers,
                        memory_limit, path, text, progress,
                    )  # fmt: skip

                    def images_of(seed: int, splits: Splits = splits, draws: dict[int, Draw] = draws) -> Draw:
                        if seed not in draws:
                            draws[seed] = draw(splits, options, seed, memory_limit // len(seeds))
                        return draws[seed]

                    todo.run(work, images_of)
            stack.close()
        us.meet()
    return result


def _check(
    models: Models,
    data: Mapping[str, Splits],
    methods: Sequence[str],
    seeds: Sequence[int],
    grids: Mapping[str, Mapping[str, Sequence[float]]],
    bn: str,
    precision: str,
) -> list[tuple[Method, list[dict[str, float | str]]]]:
    for what, given in (("models", models), ("data", data), ("methods", methods), ("seeds", seeds)):
        if not len(given):
            raise ValueError(f"{what} must hold at least one, got none")
    if bn not in BN_MODES:
        raise ValueError(f"bn must be one of {BN_MODES}, got {bn!r}")
    chosen = [method(name) for name in dict.fromkeys(methods)]
    if unknown := sorted(set(grids) - {m.name for m in chosen}):
        raise ValueError(f"grids must be of methods that take part, {[m.name for m in chosen]}, got {unknown}")
    for module in ("accelerate", "peft", "safetensors"):
        require(module, "adapters", "comparing methods")
    from .training import PRECISIONS

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    return [(m, m.settings(grids.get(m.name))) for m in chosen]


def _built(source: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    return source if isinstance(source, nn.Module) else source()


@dataclass(frozen=True)
class _Todo:
    """The runs of one method on one model and data set; those that are there are not repeated."""

    model: str
    data: str
    method: Method
    settings: list[dict[str, float | str]]
    seeds: Sequence[int]
    now: Callable[[], TransferComparison]
    keep: Callable[[Cell], None]

    def cells(self) -> dict[tuple[Any, ...], Cell]:
        return {c.key: c for c in self.now().cells}

    def blank(self, seed: int, setting: Setting) -> Cell:
        return Cell(self.model, self.data, self.method.name, seed, dict(setting), 0, 0, [], 0, 0.0)

    def finished(self) -> bool:
        """Whether the setting that validation chooses has been tested on every seed, and no other one."""
        cells = self.cells()
        tried = [cells.get(self.blank(self.seeds[0], setting).key) for setting in self.settings]
        if None in tried:
            return False
        best = _best(tried)  # type: ignore[arg-type]
        return not self.strays(best) and all(
            (cell := cells.get(self.blank(seed, best.setting).key)) is not None and cell.test is not None
            for seed in self.seeds
        )

    def strays(self, best: Cell) -> list[Cell]:
        """Tested runs of a setting that validation does not choose."""
        return [c for c in self.now().tested(self.model, self.data, self.method.name) if c.setting != best.setting]

    def run(self, work: _Work, images_of: Callable[[int], Draw]) -> None:
        def trained(seed: int, setting: Setting, to_test: bool = False) -> Cell:
            blank = self.blank(seed, setting)
            found = self.cells().get(blank.key)
            if found is not None and to_test and found.test is None and (reason := work.lost(found)):
                work.tell(f"{title(found)}: {reason}; this run is done again")
                found = None
            if found is None:
                found = work.train(self.method, blank, images_of(seed))
                self.keep(found)
            return found

        tried = [trained(self.seeds[0], setting) for setting in self.settings]
        best = _best(tried)
        for stray in self.strays(best):
            work.tell(f"{title(stray)}: validation chooses {describe(best.setting)}; its test does not count")
            self.keep(replace(stray, test=None, right=""))
        for seed in self.seeds:
            cell = trained(seed, best.setting, to_test=True)
            if cell.test is None:
                self.keep(work.tested(self.method, cell, images_of(seed)))
        if work.us.rank == 0:
            for cell in tried:
                if cell is not best:
                    weights_path(work.folder, cell).unlink(missing_ok=True)


def _best(tried: Sequence[Cell]) -> Cell:
    return max(tried, key=lambda cell: rank(cell.validation))


@dataclass(frozen=True)
class _Work:
    """One process's part of the runs on one model."""

    model: nn.Module
    classes: int
    accelerator: Any
    us: Group
    budget: Budget
    bn: str
    betas: Sequence[float]
    activations: Sequence[str] | None
    workers: int
    memory_limit: int
    folder: Path
    text: str
    progress: bool

    def train(self, method: Method, blank: Cell, images: Draw) -> Cell:
        """One run, its weights saved."""
        started = time.perf_counter()
        if method.attach is None:
            run, detail = self._frozen(method, images).fit(
                images.train, images.val, images.labels, self.classes, float(blank.setting["head_lr"]), blank.seed
            )
            parameters, head = 0, sum(v.numel() for v in run.state.values())
        else:
            with self._attached(method, blank, images) as attached:
                run = self._trained(attached, blank, images)
                detail, parameters, head = learned(attached.network, run.state), attached.parameters, attached.head
        file = weights_path(self.folder, blank)
        record = self.us.share(save_weights(file, run.state) if self.us.rank == 0 else None)
        return replace(
            blank,
            parameters=parameters,
            head=head,
            epochs=run.epochs,
            best=run.best,
            seconds=time.perf_counter() - started,
            detail=detail,
            diverged=run.diverged,
            weights=record,
        )

    def lost(self, cell: Cell) -> str | None:
        """Why the run's weights cannot be tested; None if they can."""
        return self.us.share(damage(weights_path(self.folder, cell), cell.weights) if self.us.rank == 0 else None)

    def tell(self, sentence: str) -> None:
        if self.us.rank == 0:
            warnings.warn(f"{self.folder / 'result.json'}: {sentence}", stacklevel=3)

    def tested(self, method: Method, cell: Cell, images: Draw) -> Cell:
        """The run with its test accuracy, from its saved weights."""
        from .training import score

        state = read_weights(weights_path(self.folder, cell))
        if method.attach is None:
            frozen = self._frozen(method, images)
            right = frozen.right(images.test, images.labels["test"], state, cell.detail.get("beta"))
        else:
            with self._attached(method, cell, images) as attached:
                network = attached.network.to(self.accelerator.device)
                load_state(network, state)
                right, _ = score(self.accelerator, network, images.test, self.budget.batch_size, self.workers)
        digits = "".join("1" if r else "0" for r in right)
        return replace(cell, test=digits.count("1") / len(digits), right=digits)

    @contextmanager
    def _attached(self, method: Method, cell: Cell, images: Draw) -> Iterator[Attached]:
        """A copy of the model with a new head and the method on it."""
        assert method.attach is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed)
            network, head = with_head(self.model, self._example(images), self.classes, cell.seed)
            yield method.attach(network, head, cell.setting, self.activations, images.train[0][0].shape[-1])

    def _trained(self, attached: Attached, cell: Cell, images: Draw) -> Run:
        from .training import train

        steps = -(-len(images.labels["train"]) // self.budget.batch_size) * self.budget.epochs
        setting = describe(cell.setting)
        with bar(steps, f"{self.text}, {setting}, seed {cell.seed}", self.progress and self.us.rank == 0) as advance:
            return train(
                self.accelerator,
                attached.network,
                attached.groups,
                images.train,
                images.val,
                budget=self.budget,
                seed=cell.seed,
                bn_train=self.bn != "eval",
                workers=self.workers,
                advance=advance,
            )

    def _frozen(self, method: Method, images: Draw) -> Frozen:
        return Frozen(
            model=self.model,
            example=self._example(images),
            betas=None if method.coeff is None else self.betas,
            coeff=0.5 if method.coeff is None else method.coeff,
            activations=self.activations,
            recalibrate=images.train if self.bn == "train" else None,
            budget=self.budget,
            group=self.us,
            batch_size=self.budget.batch_size,
            workers=self.workers,
            memory_limit=self.memory_limit,
            progress=self.progress,
        )

    def _example(self, images: Draw) -> Tensor:
        return images.train[0][0][None].to(self.accelerator.device)


def learned(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """``detail`` of a network whose curvature was learned: a summary of every site's beta and coeff."""
    sites: dict[str, dict[str, Any]] = {}
    for name, module in network.named_modules():
        for value in ("beta", "coeff"):
            raw = state.get(f"{name}.curvature_raw_{value}.default")
            if raw is not None:
                site = str(module.site)
                sites.setdefault(site, {})[value] = _distribution(raw.sigmoid())
    return {"curvature": sites} if sites else {}


def _distribution(values: Tensor) -> dict[str, Any]:
    x = values.double().flatten()
    return {
        "mean": float(x.mean()),
        "deviation": float(x.std()) if len(x) > 1 else 0.0,
        "low": float(x.min()),
        "high": float(x.max()),
        "histogram": [int(n) for n in torch.histc(x, bins=20, min=0, max=1)],
    }
