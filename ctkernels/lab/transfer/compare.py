"""The comparison on images: every method on every network and data set, run by the experiment engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..._extras import require
from .._distributed import Group, group
from .._progress import bar
from .._restoring import evaluation
from .._weights import check_same, digest_of
from ..config import configured
from ..executor import Executor
from ..experiment import Study, TrainingLog, plan_of
from ..labelled import Splits
from .config import TransferConfig
from .folds import FoldLog, on_folds
from .frozen import FrozenNetwork
from .heads import with_head
from .inputs import Models, Split, check_data, check_model, draw
from .methods import Attached, Method, method
from .result import RunResult, TransferComparison
from .state import load_state

DEFAULT_METHODS = ("linear", "sct", "lora-r1", "tct", "tct+lora-r1")
PAPER_SEEDS = (42, 43, 44)


def compare_transfer(
    models: Models,
    data: Mapping[str, Splits],
    config: TransferConfig | None = None,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: Sequence[int] = PAPER_SEEDS,
    grids: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    out: str | PathLike[str] | None = None,
    executor: Executor | None = None,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> TransferComparison:
    """Compare ways to adapt pretrained image classifiers to new data: the tables of the Curvature Tuning paper.

    Every method trains a new linear head with the same schedule, from the same initial weights, and keeps the epoch
    with the best validation accuracy. ``linear`` does so on frozen features; ``sct`` on frozen features at every beta,
    of which validation chooses one: the plain network unless another is better by more than one standard error
    (``margin``); ``lora-rN`` trains LoRA of rank N on every convolution and linear layer as well (peft); ``tct`` a beta
    and a coefficient per channel of every activation; ``tct+lora-rN`` both; ``sct-mean-free`` is ``sct`` with the
    coefficient beta^2 / (1 + beta^2) in place of 0.5. Dropout is off throughout, so that frozen features are what the
    network gives in training.

    Where a method's grid has several settings, each is trained on the first seed, and the one with the best validation
    accuracy is used for all seeds. With few validation images every run is trained on several folds, and epochs, betas
    and settings are compared by all of them (``folds``). The test images, the same for every seed, are read once per chosen run.

    With ``out``, every finished run is kept in ``out/result.json`` and its weights in ``out/weights``; a call that was
    cut short goes on from there, and models, data sets, methods and seeds can be added. Training runs on accelerate:
    on this process's GPU or the CPU; under ``torchrun`` every step's batch is dealt to the processes.

    Args:
        models: networks by name, or functions that build them; pretrained, and left as they were.
        data: :class:`Splits` by name, such as :func:`load_data` gives.
        config: everything that is alike for all methods.
        methods: which, in the order of the table.
        seeds: of validation splits, samples, initial weights and order. The first also chooses settings.
        grids: values to try instead of the paper's: ``{"tct": {"lr": [0.1, 0.01]}, "lora-r1": {"lr": [1e-3]}}``.
        out: folder for results. Default: nothing is kept.
        executor: where training and testing are done. Default: in this process. A :class:`RayExecutor`: on the machines
            of a cluster; data in memory and networks are sent there, folders and what functions load must be there.
        extra: more entries for the result file.
        options: fields of :class:`TransferConfig`, in place of ``config``'s.

    Raises:
        ValueError: before any long work: an unknown method, a grid that does not fit, no seeds, a data set that cannot
            be split or has one class or NaN, a network without an activation or that does not take the images, results
            of another set-up in ``out``.
        ImportError: accelerate, peft or tqdm is missing; the message names the extra.

    Examples:
        >>> options = {"images": ImageOptions(16, 16), "training": TrainingConfig(epochs=1), "progress": False}
        >>> result = compare_transfer({"small": model}, {"photos": load_data("photos/")}, methods=["linear", "sct"], **options)
        >>> print(result.table())
        small
        data                   linear probe          S-CT
        ...

    Source: Curvature Tuning paper, section 4 and appendix B. Unlike its code: LoRA's rank is a method of its own and
    nothing is chosen on test images; every method keeps its best validation epoch; batch normalisation is alike.
    """
    config = configured(TransferConfig, config, options)
    for name, values in (("models", models), ("data", data), ("methods", methods), ("seeds", seeds)):
        if not len(values):
            raise ValueError(f"{name} must hold at least one, got none")
    plan = plan_of(map(method, methods), grids)
    for module in ("accelerate", "peft", "safetensors"):
        require(module, "adapters", "comparing methods")
    from .training import make_accelerator

    accelerator = make_accelerator(config.precision, config.cpu)
    processes = group(accelerator.device)
    if config.training.batch_size % processes.size:
        size = config.training.batch_size
        raise ValueError(f"batch_size must be a multiple of the {processes.size} processes, got {size}")
    seeds = list(dict.fromkeys(seeds))
    chosen: list[Any] = [m for m, _ in plan]
    setup: dict[str, Any] = {
        "models": {n: check_model(n, _built(m), chosen, data, config) for n, m in models.items()},
        "data": {n: check_data(n, splits, config, seeds) for n, splits in data.items()},
        "methods": {m.name: settings for m, settings in plan},
        "seeds": seeds,
        "betas": list(config.grid),
        "budget": asdict(config.training),
        "margin": config.margin,
        "bn": config.bn,
        "images": asdict(config.images),
        "activations": config.activations and list(config.activations),
        "precision": config.precision,
        "processes": processes.size,
    }
    with (
        Study.opened(TransferComparison((), setup), out, processes, executor, extra) as study,
        closing(_tasks(models, data, config, setup, accelerator, processes)) as tasks,
    ):
        study.run(tasks, plan, seeds)
    return study.result


def _tasks(
    models: Models,
    data: Mapping[str, Splits],
    config: TransferConfig,
    setup: Mapping[str, Any],
    accelerator: Any,
    processes: Group,
) -> Generator[TransferTask, None, None]:
    """Every network on every data set; a network is let go before the next is built."""
    for name, source in models.items():
        with ExitStack() as stack:
            network = functools.cache(functools.partial(_opened, source, accelerator.device, stack))
            for data_name, splits in data.items():
                about = _About(name, source, data_name, splits, config, setup)
                yield TransferTask(about, network, about.images(network), accelerator, processes)


def _built(source: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    return source if isinstance(source, nn.Module) else source()


def _opened(source: nn.Module | Callable[[], nn.Module], device: torch.device, stack: ExitStack) -> nn.Module:
    """The network on its device, in evaluation mode until ``stack`` is closed."""
    return stack.enter_context(evaluation(_built(source).to(device)))


@dataclass(frozen=True)
class _About:
    """A network and a data set, as they were given."""

    model: str
    source: nn.Module | Callable[[], nn.Module]
    data: str
    splits: Splits
    config: TransferConfig
    setup: Mapping[str, Any]

    @property
    def folds(self) -> int:
        """How often the images are cut into training and validation images."""
        return self.setup["data"][self.data]["folds"]

    def images(self, network: Callable[[], nn.Module]) -> Callable[[int], Split]:
        """A function that prepares a seed's examples for the network and keeps them."""
        memory = self.config.memory_limit // len(self.setup["seeds"])
        return functools.cache(lambda seed: draw(self.splits, self.config.images, seed, memory, network()))

    def task(self) -> TransferTask:
        """The task in another process, without a progress bar. ValueError if network or data are not those of the setup."""
        from .training import make_accelerator

        about = replace(self, config=replace(self.config, progress=False))
        accelerator = make_accelerator(self.config.precision, self.config.cpu)
        network = _built(self.source).to(accelerator.device).eval()
        check_same(f"model {self.model}", self.setup["models"][self.model]["digest"], digest_of(network))
        data = check_data(self.data, self.splits, self.config, self.setup["seeds"][:1])
        check_same(f"data {self.data}", self.setup["data"][self.data]["digest"], data["digest"])
        images = about.images(lambda: network)
        return TransferTask(about, lambda: network, images, accelerator, group(accelerator.device))


@dataclass(frozen=True)
class TransferTask:
    """Runs on one network and one data set.

    ``network`` builds the network, and ``images`` prepares a seed's images, when first asked.
    """

    about: _About
    network: Callable[[], nn.Module]
    images: Callable[[int], Split]
    accelerator: Any
    group: Group

    @property
    def config(self) -> TransferConfig:
        return self.about.config

    @property
    def gpu(self) -> bool:
        return not self.config.cpu

    def elsewhere(self) -> Callable[[], TransferTask]:
        return self.about.task

    def names(self) -> dict[str, Any]:
        return {"model": self.about.model, "data": self.about.data}

    def train(self, method: Method, run: RunResult) -> TrainingLog:
        images = self.images(run.seed)
        cuts = images.cuts(self.about.folds, run.seed)
        if method.attach is None:
            classes = len(self.about.splits.train.classes)
            return self._frozen(method, run).fit(classes, run.setting["head_lr"], run.seed, cuts)

        def fit(fold: tuple[Dataset[Any], Dataset[Any]], others: Sequence[FoldLog]) -> FoldLog:
            with self._attached(method, run) as attached:
                log = self._trained(attached, run, *fold, others)
                log.details |= {"parameters": attached.parameters, "head": attached.head, "validated": log.validated}
                log.details["detail"] = learned(attached.network, log.state)
                return log

        return on_folds(images.parts(cuts), fit)

    def test(self, method: Method, run: RunResult, state: Mapping[str, Tensor]) -> dict[str, Any]:
        from .training import score

        if method.attach is None:
            right = self._frozen(method, run).right(dict(state), run.detail.get("beta"))
        else:
            with self._attached(method, run) as attached:
                network = attached.network.to(self.accelerator.device)
                load_state(network, state)
                size, workers = self.config.training.batch_size, self.config.workers
                right, _ = score(self.accelerator, network, self.images(run.seed).test, size, workers)
        digits = "".join("1" if r else "0" for r in right)
        return {"test": digits.count("1") / len(digits), "right": digits}

    def _frozen(self, method: Method, run: RunResult) -> FrozenNetwork:
        return FrozenNetwork(self.network(), method.coeff, self.config, self.group, self.images(run.seed))

    @contextmanager
    def _attached(self, method: Method, run: RunResult) -> Iterator[Attached]:
        """A copy of the network with a new head and the method on it."""
        assert method.attach is not None
        image = self.images(run.seed).train[0][0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            example, classes = image[None].to(self.accelerator.device), len(self.about.splits.train.classes)
            network, head = with_head(self.network(), example, classes, run.seed)
            yield method.attach(network, head, run.setting, self.config.activations, example)

    def _trained(self, attached: Attached, run: RunResult, images: Any, val: Any, others: Sequence[FoldLog]) -> FoldLog:
        from .training import train

        config = self.config
        steps = -(-len(images) // config.training.batch_size) * config.training.epochs
        with bar(steps, run.title, config.progress and self.group.rank == 0) as advance:
            network, groups = attached.network, attached.groups
            return train(self.accelerator, network, groups, images, val, config, run.seed, advance, others)


def learned(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Summarise every site's learned beta and coeff: ``detail`` of a :class:`RunResult`."""
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
