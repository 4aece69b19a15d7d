"""ResNet-50 with CT units, end to end: fused, as published, and compiled, against the plain network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctkernels

from . import measure
from .ctu import DTYPES, official
from .report import table

BATCH, SIZE = {"cpu": 8, "cuda": 128}, 224
PROCESSES = 3
PLAIN, FOLDED, OURS, OFFICIAL = "plain ReLU", "plain ReLU, BatchNorm folded", "CT, fused", "CT as published"
CUDNN = "plain ReLU, BatchNorm folded, all in cuDNN's convolutions"
COMPILED, GRAPHED = ", compiled", ", in a CUDA graph"
PUBLISHED = (OFFICIAL, OFFICIAL + COMPILED)


class OfficialUnit(nn.Module):
    """The Curvature Tuning authors' module: the published expression with logits of beta and coeff, shared or per channel."""

    def __init__(self, channels: int | None, beta: float) -> None:
        super().__init__()
        shape = (1,) if channels is None else (1, channels, 1, 1)
        self.raw_beta = nn.Parameter(torch.logit(torch.full(shape, beta)), requires_grad=channels is not None)
        self.raw_coeff = nn.Parameter(torch.zeros(shape), requires_grad=channels is not None)

    def forward(self, x: Tensor) -> Tensor:
        return official(x, self.raw_beta.to(x.dtype), self.raw_coeff.to(x.dtype))


def _separate(model: nn.Module) -> nn.Module:
    """Give each block three ReLUs: torchvision's share one for three channel counts, and learned units need three."""
    from torchvision.models.resnet import Bottleneck

    class Block(Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
            out += x if self.downsample is None else self.downsample(x)
            return self.relu3(out)

    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.__class__ = Block
            module.relu2, module.relu3 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    return model


def network(dtype: torch.dtype, device: str) -> nn.Module:
    """A frozen ResNet-50 in evaluation mode with realistic statistics, in the fastest memory format for convolutions."""
    import torchvision

    generator = torch.Generator().manual_seed(0)
    model = _separate(torchvision.models.resnet50())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(
                0.2, 0.6, generator=generator
            )  # activations keep their size from block to block
    return model.to(device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def _replace_relus(model: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """Replace every ReLU by ``make(channels)``."""
    model.relu = make(model.bn1.num_features)
    for block in (m for m in model.modules() if hasattr(m, "relu3")):
        for name, norm in (("relu", block.bn1), ("relu2", block.bn2), ("relu3", block.bn3)):
            setattr(block, name, make(norm.num_features))
    return model


def _convolved(layer: Any, x: Tensor, added: Tensor | None = None) -> Tensor:
    """ReLU of a convolution with its bias, and of a sum with a tensor, in one call of cuDNN."""
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    if added is None:
        return torch.ops.aten.cudnn_convolution_relu(x, layer.weight, layer.bias, *geometry)
    return torch.ops.aten.cudnn_convolution_add_relu(x, layer.weight, added, 1.0, layer.bias, *geometry)


class _ConvolvedReLU(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return _convolved(self.layer, x)


def with_cudnn(model: Any) -> nn.Module:
    """The network with BatchNorms folded into convolutions, and bias, sum and ReLU inside of them, for inference on a GPU."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    from torchvision.models.resnet import Bottleneck

    class Block(Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            out = _convolved(self.conv2, _convolved(self.conv1, x))
            return _convolved(self.conv3, out, x if self.downsample is None else self.downsample(x))

    for block in (module for module in model.modules() if isinstance(module, Bottleneck)):
        for i in "123":
            setattr(block, f"conv{i}", fuse_conv_bn_eval(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")))
        if block.downsample is not None:
            block.downsample = fuse_conv_bn_eval(*block.downsample)
        block.__class__ = Block
    model.conv1 = _ConvolvedReLU(fuse_conv_bn_eval(model.conv1, model.bn1))
    model.bn1, model.relu = nn.Identity(), nn.Identity()
    return model


def contestants(dtype: torch.dtype, trained: bool, device: str = "cpu") -> dict[str, nn.Module]:
    """The networks, with learned units or with one (beta, coeff) for all."""
    base = network(dtype, device)
    published, ours = copy.deepcopy(base), copy.deepcopy(base)
    _replace_relus(published, lambda channels: OfficialUnit(channels if trained else None, 0.8 if trained else 0.9))
    published.to(device)
    if trained:
        _replace_relus(ours, ctkernels.nn.TrainableCTU).to(device)
    else:
        ctkernels.steer(ours, 0.9)
    ctkernels.fuse(ours)
    networks = {PLAIN: base, OURS: ours, OFFICIAL: published}
    if not trained:
        import torch.fx.experimental.optimization

        networks[FOLDED] = torch.fx.experimental.optimization.fuse(copy.deepcopy(base))
        if device != "cpu":
            networks[CUDNN] = with_cudnn(copy.deepcopy(base))
    return networks


def _inputs(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator, batch = torch.Generator().manual_seed(1), BATCH[device]
    x = torch.randn(batch, 3, SIZE, SIZE, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    return x.to(device), torch.randint(1000, (batch,), generator=generator).to(device)


def inference(model: Any, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(x)

    return call


def step(model: Any, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step of the trainable parameters; without any, forward and backward to the input."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True, capturable=x.is_cuda) if parameters else None

    def call() -> None:
        images = x if parameters else x.clone().requires_grad_()
        loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return call


def _full(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Make all parameters trainable, and BatchNorm use batch statistics."""
    return {name: model.train().requires_grad_() for name, model in networks.items()}


def run(dtypes: list[str], seconds: float, quick: bool, device: str = "cpu") -> list[dict[str, Any]]:
    """Return a record of milliseconds and peak bytes per dtype (``quick``: in one process)."""
    count = 1 if quick or device != "cpu" else PROCESSES
    return [
        {
            "network": "resnet50",
            "dtype": name,
            "batch": BATCH[device],
            **measure.over_processes(count, _run, device, name, seconds, quick),
        }
        for name in dtypes
    ]


def _run(seed: int, device: str, name: str, seconds: float, quick: bool) -> dict[str, Any]:
    """Medians and peak bytes of one process."""
    dtype = DTYPES[name]
    x, labels = _inputs(dtype, device)
    _check(dtype, device)
    fixed, learned = contestants(dtype, False, device), contestants(dtype, True, device)
    calls = {label: inference(model, x) for label, model in fixed.items()}
    steps = {label: step(model, x, labels) for label, model in learned.items()}
    memory: dict[str, float] = {label: measure.peak_bytes(call) for label, call in steps.items()}
    if device != "cpu":  # eager networks of this size can be bound by the host
        for runs in (calls, steps):
            runs |= {label + GRAPHED: measure.graphed(run) for label, run in runs.items()}
    elif not quick:
        for label in (OURS, OFFICIAL):
            compiled = torch.compile(fixed[label], fullgraph=True), torch.compile(learned[label], fullgraph=True)
            calls[label + COMPILED] = inference(compiled[0], x)
            steps[label + COMPILED] = step(compiled[1], x, labels)
    wait = None if device == "cpu" else torch.cuda.synchronize
    times = [measure.interleaved(runs, seconds * 6, seldom=PUBLISHED, seed=seed, wait=wait) for runs in (calls, steps)]
    full = _full(contestants(dtype, True, device))
    everything: dict[str, float] = {label: measure.peak_bytes(step(model, x, labels)) for label, model in full.items()}
    return {
        "inference_ms": times[0],
        "step_ms": times[1],
        "step_peak_bytes": memory,
        "full_step_peak_bytes": everything,
    }


def _check(dtype: torch.dtype, device: str) -> None:
    """Check that our network and the published one agree, so that no time is reported for a wrong one."""
    x = _inputs(dtype, device)[0][:1, :, :64, :64]
    for trained in (False, True):
        networks = contestants(dtype, trained, device)
        truth = copy.deepcopy(networks[OFFICIAL]).double()(x.double())
        theirs, ours = (networks[name](x).double() for name in (OFFICIAL, OURS))
        error, allowed = (ours - truth).abs().max(), 2 * (theirs - truth).abs().max()
        # The published unit adds 1e-6 to 1 - beta.
        allowed = allowed + (torch.finfo(dtype).eps + 1e-5) * truth.abs().max()
        if not error <= allowed:
            raise AssertionError(f"the fused network is off by {error:.3g}, allowed {allowed:.3g}: not timed")
        if CUDNN in networks:
            check_cudnn(networks[PLAIN], networks[CUDNN], x)


def check_cudnn(plain: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Check that the network of cuDNN's convolutions computes what the plain one does."""
    truth = copy.deepcopy(plain).double()(x.double())
    error, theirs = ((model(x).double() - truth).abs().max() for model in (other, plain))
    if not error <= 2 * theirs + torch.finfo(x.dtype).eps * truth.abs().max():
        raise AssertionError(
            f"the network of cuDNN's convolutions is off by {error:.3g}, the plain one {theirs:.3g}: not timed"
        )


def bars(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios that have bounds, with these."""
    rows = []
    for record in records:
        i, t, m = record["inference_ms"], record["step_ms"], record["step_peak_bytes"]
        ratios = [
            ("inference: fused / plain", i[OURS] / i[PLAIN], "<=", 0.97),
            ("inference: fused / plain with BatchNorm folded", i[OURS] / i[FOLDED], "<=", 1.03),
            ("step of learned units / plain forward + backward", t[OURS] / t[PLAIN], "<=", 1.05),
            ("inference: as published / ours", i[OFFICIAL] / i[OURS], ">=", 1.9),
            ("step: as published / ours", t[OFFICIAL] / t[OURS], ">=", 1.9),
            ("peak memory of a step / plain", m[OURS] / m[PLAIN], "<=", 1.02),
        ]
        for kind, ms in (("inference", i), ("step", t)):
            if OFFICIAL + COMPILED in ms:
                theirs, ours = ms[OFFICIAL + COMPILED], ms[OURS + COMPILED]
                ratios += [
                    (f"{kind}: as published, compiled / ours", theirs / ms[OURS], ">=", 1.0),
                    (f"{kind}: as published, compiled / ours, compiled", theirs / ours, ">=", 1.0),
                    (f"{kind}: ours, compiled / ours", ours / ms[OURS], "<=", 1.0),
                ]
        if CUDNN in i:
            ratios.append(("inference: fused / all in cuDNN's convolutions", i[OURS] / i[CUDNN], "<=", 1.0))
        f = record["full_step_peak_bytes"]
        ratios.append(("peak memory of a step that trains everything / plain", f[OURS] / f[PLAIN], "<=", 1.02))
        rows += [measure.bar(record["dtype"], *ratio) for ratio in ratios]
    return rows


def text(records: list[dict[str, Any]]) -> str:
    """The records as tables."""
    parts = []
    for record in records:
        names = list(dict.fromkeys([*record["inference_ms"], *record["step_ms"]]))
        rows = []
        for name in names:
            peaks = [record[key].get(name) for key in ("step_peak_bytes", "full_step_peak_bytes")]
            times = [record[key].get(name) for key in ("inference_ms", "step_ms")]
            shown = ["" if v is None else f"{v:.1f}" for v in times] + [
                "" if v is None else f"{v / 2**20:.0f}" for v in peaks
            ]
            rows.append([name, *shown])
        title = f"ResNet-50, batch {record['batch']} x {SIZE}^2, {record['dtype']}, channels last (all of them)"
        head = ["", "inference, ms", "step, ms", "peak, MiB", "peak, all trained"]
        parts.append(f"{title}\n{table(head, rows)}")
    return "\n\n".join(parts)
