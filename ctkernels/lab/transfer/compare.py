"""The comparison on labelled examples: every method on every network and data set, run by the experiment engine."""

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
from ..experiment import Plan, Source, Study, TrainingLog, build, plan_of
from ..labelled import Splits
from ..stats import accuracy, marks
from .config import TransferConfig
from .folds import FoldLog, on_folds
from .frozen import FrozenNetwork
from .heads import with_head
from .inputs import PreparedSplit, check_data, check_model, prepare_split
from .methods import Attached, Method, method
from .result import RunResult, TransferComparison
from .state import load_state

DEFAULT_METHODS = ("linear", "sct", "lora-r1", "tct", "tct+lora-r1")
PAPER_SEEDS = (42, 43, 44)


def compare_transfer(
    models: Mapping[str, Source],
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
    """Compares methods of adapting pretrained classifiers to new data: the tables of the Curvature Tuning paper.

    Every method trains a new linear head with the same schedule, from the same initial weights, and keeps the epoch
    with the best validation accuracy. ``linear`` trains the head alone, on frozen features; ``sct`` does so at every beta,
    of which validation chooses one: the plain network unless another is better by more than one standard error
    (``margin``). ``lora-rN`` also trains LoRA of rank N on every convolution and linear layer (peft); ``tct`` a beta and a
    coefficient per channel of every activation; ``tct+lora-rN`` both. ``sct-mean-free`` is ``sct`` with the coefficient
    beta^2 / (1 + beta^2) instead of 0.5. Dropout is off throughout, so that the frozen features equal those in training.

    If a method's grid has several settings, each is trained on the first seed, and the one with the best validation
    accuracy is used for all seeds. With few validation examples every run is trained on several folds, on all of which
    epochs, betas and settings are compared (``folds``). The test examples, the same for every seed, are read once per
    chosen run.

    With ``out``, every finished run is written to ``out/result.json`` and its weights to ``out/weights``; a call that was
    interrupted resumes from there, and models, data sets, methods and seeds can be added. Training uses accelerate, on the
    GPU of this process or the CPU; under ``torchrun`` the processes share each batch.

    Args:
        models: pretrained networks by name, or functions that build them; unchanged afterwards.
        data: :class:`Splits` by name, such as :func:`load_data` returns.
        config: settings that all methods share.
        methods: their names, in the order of the table.
        seeds: of validation splits, samples, initial weights and order. The first also chooses settings.
        grids: values to try instead of the paper's: ``{"tct": {"lr": [0.1, 0.01]}, "lora-r1": {"lr": [1e-3]}}``.
        out: folder for results. Default: a temporary one.
        executor: of training and testing. Default: this process. A :class:`RayExecutor` uses the machines of a cluster;
            networks and data in memory are sent there, but folders, and whatever functions load, must exist there.
        extra: further entries of the result file.
        options: fields of :class:`TransferConfig`, which replace those of ``config``.

    Raises:
        ValueError: raised before any long work: a method is unknown, a grid does not fit its method, there are no seeds, a
            data set cannot be split or has one class or NaN, a network has no activation or does not take the examples, or
            ``out`` has results of another setup.
        ImportError: accelerate, peft or tqdm is missing; the message names the extra.

    Examples:
        >>> options = {"images": ImageOptions(16, 16), "training": TrainingConfig(epochs=1), "progress": False}
        >>> result = compare_transfer({"small": model}, {"photos": load_data("photos/")}, methods=["linear", "sct"], **options)
        >>> print(result.table())
        small
        data                   linear probe          S-CT
        ...

    Source: Curvature Tuning paper, section 4 and appendix B. Unlike in its code, each rank of LoRA is a separate method,
    nothing is chosen on test images, every method keeps its best validation epoch, and batch normalisation is the same for
    all methods.
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
    processes.check_batch_size(config.training.batch_size)
    seeds = list(dict.fromkeys(seeds))
    setup = _setup(models, data, plan, seeds, config, processes)
    with (
        Study.opened(TransferComparison((), setup), out, processes, executor, extra) as study,
        closing(_tasks(models, data, config, setup, accelerator, processes)) as tasks,
    ):
        study.run(tasks, plan, seeds)
    return study.result


def _setup(
    models: Mapping[str, Source],
    data: Mapping[str, Splits],
    plan: Plan,
    seeds: Sequence[int],
    config: TransferConfig,
    processes: Group,
) -> dict[str, Any]:
    """Checks the networks and the data. Returns everything that determines the numbers."""
    chosen: list[Any] = [m for m, _ in plan]
    return {
        "models": {n: check_model(n, build(source), chosen, data, config) for n, source in models.items()},
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


def _tasks(
    models: Mapping[str, Source],
    data: Mapping[str, Splits],
    config: TransferConfig,
    setup: Mapping[str, Any],
    accelerator: Any,
    processes: Group,
) -> Generator[TransferTask, None, None]:
    """The tasks: every network on every data set. A network is released before the next is built."""
    for name, source in models.items():
        with ExitStack() as stack:
            network = functools.cache(functools.partial(_opened, source, accelerator.device, stack))
            for data_name, splits in data.items():
                yield TransferTask(name, source, data_name, splits, config, setup, accelerator, processes, network)


def _opened(source: Source, device: torch.device, stack: ExitStack) -> nn.Module:
    """The network on its device, in evaluation mode until ``stack`` is closed."""
    return stack.enter_context(evaluation(build(source).to(device)))


@dataclass(frozen=True)
class TransferTask:
    """The runs on one network and one data set.

    Attributes:
        model, data: names of the network and the data set.
        network: builds the network at its first call.
    """

    model: str
    source: Source
    data: str
    splits: Splits
    config: TransferConfig
    setup: Mapping[str, Any]
    accelerator: Any
    group: Group
    network: Callable[[], nn.Module]

    @functools.cached_property
    def split_of(self) -> Callable[[int], PreparedSplit]:
        """A function from a seed to its prepared examples, which it keeps."""
        memory = self.config.memory_limit // len(self.setup["seeds"])
        splits, options, network = self.splits, self.config.images, self.network  # without self, which would be a cycle
        return functools.cache(lambda seed: prepare_split(splits, options, seed, memory, network()))

    @property
    def classes(self) -> int:
        return len(self.splits.train.classes)

    @property
    def gpu(self) -> bool:
        return not self.config.cpu

    def factory(self) -> Callable[[], TransferTask]:
        return functools.partial(_construct, self.model, self.source, self.data, self.splits, self.config, self.setup)

    def names(self) -> dict[str, Any]:
        return {"model": self.model, "data": self.data}

    def train(self, method: Method, run: RunResult) -> TrainingLog:
        split = self.split_of(run.seed)
        cuts = split.cuts(self.setup["data"][self.data]["folds"], run.seed)
        if method.attach is None:
            return self._frozen(method, run).fit(self.classes, run.setting["head_lr"], run.seed, cuts)

        def fit(fold: tuple[Dataset[Any], Dataset[Any]], others: Sequence[FoldLog]) -> FoldLog:
            with self._attached(method, run) as attached:
                log = self._train_fold(attached, run, *fold, others)
                log.details |= {"parameters": attached.parameters, "head": attached.head, "validated": log.validated}
                log.details["detail"] = learned(attached.network, log.state)
                return log

        return on_folds(split.parts(cuts), fit)

    def test(self, method: Method, run: RunResult, state: Mapping[str, Tensor]) -> dict[str, Any]:
        from .training import score

        if method.attach is None:
            right = self._frozen(method, run).right(dict(state), run.detail.get("beta"))
        else:
            with self._attached(method, run) as attached:
                network = attached.network.to(self.accelerator.device)
                load_state(network, state)
                size, workers = self.config.training.batch_size, self.config.workers
                right, _ = score(self.accelerator, network, self.split_of(run.seed).test, size, workers)
        answers = marks(right)
        return {"test": accuracy(answers), "right": answers}

    def _frozen(self, method: Method, run: RunResult) -> FrozenNetwork:
        return FrozenNetwork(self.network(), method.coeff, self.config, self.group, self.split_of(run.seed))

    @contextmanager
    def _attached(self, method: Method, run: RunResult) -> Iterator[Attached]:
        """A copy of the network with a new head and the method attached."""
        assert method.attach is not None
        example = self.split_of(run.seed).train[0][0][None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            example = example.to(self.accelerator.device)
            network, head = with_head(self.network(), example, self.classes, run.seed)
            yield method.attach(network, head, run.setting, self.config.activations, example)

    def _train_fold(
        self, attached: Attached, run: RunResult, examples: Any, val: Any, others: Sequence[FoldLog]
    ) -> FoldLog:
        from .training import train

        config = self.config
        steps = -(-len(examples) // config.training.batch_size) * config.training.epochs
        with bar(steps, run.title, config.progress and self.group.rank == 0) as advance:
            network, groups = attached.network, attached.groups
            return train(self.accelerator, network, groups, examples, val, config, run.seed, advance, others)


def _construct(
    model: str, source: Source, data: str, splits: Splits, config: TransferConfig, setup: Mapping[str, Any]
) -> TransferTask:
    """Constructs a task in another process, without a progress bar. ValueError if network or data loaded there differ."""
    from .training import make_accelerator

    accelerator = make_accelerator(config.precision, config.cpu)
    network = build(source).to(accelerator.device).eval()
    check_same(f"model {model}", setup["models"][model]["digest"], digest_of(network))
    described = check_data(data, splits, config, setup["seeds"][:1])
    check_same(f"data {data}", setup["data"][data]["digest"], described["digest"])
    config, processes = replace(config, progress=False), group(accelerator.device)
    return TransferTask(model, source, data, splits, config, setup, accelerator, processes, lambda: network)


def learned(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The distributions of the learned beta and coeff of every site: ``detail`` of a :class:`RunResult`."""
    sites: dict[str, dict[str, Any]] = {}
    for name, module in network.named_modules():
        for knob in ("beta", "coeff"):
            raw = state.get(f"{name}.curvature_raw_{knob}.default")
            if raw is not None:
                site = str(module.site)
                sites.setdefault(site, {})[knob] = _distribution(raw.sigmoid())
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
