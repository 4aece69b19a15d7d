"""The vLLM plugin against the real engine: tokens are those of transformers. Runs where vLLM is installed."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

import pytest
import torch

from ctkernels.vllm import jola_fields

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
ADAPTERS, TOKENS, VOCAB = 102, 5, 512
ENGINE = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 256,
    "skip_tokenizer_init": True,
    "enable_lora": True,
    "max_loras": 100,
}


def test_the_option():
    assert jola_fields({}) is None
    assert jola_fields({"ctkernels": "jola"}) == {}
    assert jola_fields({"ctkernels": {"jola": {"edit": "additive"}}}) == {"edit": "additive"}
    assert jola_fields(object()) is None
    for wrong in ("lora", True, {"jola": 1}, {"jola": {}, "more": {}}):
        with pytest.raises(ValueError, match=r"additional_config\['ctkernels'\]: expected 'jola', or .*, got"):
            jola_fields({"ctkernels": wrong})


class Reference:
    """A model with many adapters, their folders, and what transformers generates with each."""

    def __init__(self, folder):
        import peft
        import transformers

        from ctkernels.adapters import JolaConfig, save_adapter

        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(
            **sizes, num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=64, eos_token_id=None
        )
        torch.manual_seed(0)
        self.base = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in self.base.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        self.model = folder / "model"
        self.base.save_pretrained(self.model)
        self.prompts = [torch.randint(3, VOCAB, (3 + number % 5,)).tolist() for number in range(ADAPTERS)]
        self.prompts[2] = self.prompts[1] = torch.randint(
            3, VOCAB, (40,)
        ).tolist()  # blocks that a prefix cache would share
        self.plain = self.generate(self.base, self.prompts[1])
        self.adapted = peft.get_peft_model(self.base, JolaConfig(task_type="CAUSAL_LM")).eval()
        self.folders, self.expected = {}, {}
        for number in range(1, ADAPTERS):
            with torch.no_grad():
                for name, parameter in self.adapted.named_parameters():
                    if "jola_log_alpha" in name:
                        parameter.copy_(0.2 * torch.randn_like(parameter))
                    elif "jola_" in name:
                        parameter.copy_(0.7 * torch.randn_like(parameter))
            self.folders[number] = str(folder / f"adapter{number}")
            save_adapter(self.adapted, self.folders[number])
            self.expected[number] = self.generate(self.adapted, self.prompts[number])

    def generate(self, model, prompt):
        ids = torch.tensor([prompt])
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
        return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "compiled"])
def engine(request, tmp_path_factory):
    pytest.importorskip("vllm")
    os.environ.update(SETTINGS)
    from vllm import LLM

    plugins = [entry.name for entry in entry_points(group="vllm.general_plugins")]
    assert "ctkernels" in plugins, "install ctkernels where vLLM is"
    reference = Reference(tmp_path_factory.mktemp("vllm"))
    with pytest.raises(ValueError, match=r"target_modules=.*nothing.* matched no module"):
        LLM(
            str(reference.model),
            **ENGINE,
            enforce_eager=True,
            additional_config={"ctkernels": {"jola": {"target_modules": ["nothing"]}}},
        )
    llm = LLM(str(reference.model), **ENGINE, enforce_eager=request.param, additional_config={"ctkernels": "jola"})
    return llm, reference


def ask(llm, reference, numbers, prompts=None):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [reference.prompts[number] for number in numbers] if prompts is None else prompts
    found = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=TOKENS, temperature=0, detokenize=False, ignore_eos=True),
        lora_request=[
            LoRARequest(f"adapter{number}", number, reference.folders[number]) if number else None for number in numbers
        ],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in found]


def test_tokens_are_those_of_transformers(engine):
    llm, reference = engine
    both = ask(llm, reference, [1, 2, 0], [reference.prompts[1]] * 3)
    assert both == [reference.expected[1], reference.expected[2], reference.plain]
    assert len({tuple(tokens) for tokens in both}) == 3
    numbers = list(range(1, 101))
    assert ask(llm, reference, numbers) == [reference.expected[number] for number in numbers]
    assert ask(llm, reference, [1, 2, 0], [reference.prompts[1]] * 3) == both  # its blocks come from the prefix cache
    assert llm.llm_engine.list_loras() == set(numbers)
    assert ask(llm, reference, [101, 5]) == [reference.expected[101], reference.expected[5]]  # 101 takes a slot
    assert len(llm.llm_engine.list_loras()) == 100
    assert ask(llm, reference, [1, 100]) == [reference.expected[1], reference.expected[100]]


def test_adapters_come_and_go(engine, tmp_path):
    from vllm.lora.request import LoRARequest

    llm, reference = engine
    llm.llm_engine.remove_lora(7)
    assert 7 not in llm.llm_engine.list_loras()
    assert llm.llm_engine.add_lora(LoRARequest("adapter7", 7, reference.folders[7]))
    assert llm.llm_engine.pin_lora(7)
    assert ask(llm, reference, [7]) == [reference.expected[7]]
    for path, match in ((tmp_path, "adapter_config.json"), (tmp_path / "nowhere", "folder of a saved adapter")):
        with pytest.raises(ValueError, match=match):
            llm.llm_engine.add_lora(LoRARequest("wrong", 900, str(path)))
    assert 900 not in llm.llm_engine.list_loras()
    assert ask(llm, reference, [7, 0], [reference.prompts[1]] * 2)[1] == reference.plain
