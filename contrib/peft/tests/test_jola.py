# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import JolaConfig, PeftModel, get_peft_model


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 2, bias=bias)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()


class TestJola:
    @pytest.fixture
    def x(self):
        torch.manual_seed(0)
        return torch.randn(5, 10)

    def mlp(self, bias=True, **kwargs):
        torch.manual_seed(0)
        config = JolaConfig(**({"target_modules": ["lin1"], "head_dim": 5, "init_weights": False} | kwargs))
        return get_peft_model(MLP(bias), config).eval()

    def test_is_the_formula_of_the_paper(self, x):
        model = self.mlp(init_log_alpha=0.4)
        layer = model.base_model.model.lin1
        m, a = (table["default"].detach() for table in (layer.jola_m, layer.jola_a))
        gate = (1.2 * torch.tensor(0.4).sigmoid() - 0.1).clamp(0, 1)
        z = torch.relu(model.base_model.model.lin0(x)).view(5, 4, 5)
        expected = layer.base_layer(((1 + gate * m) * z + gate * a).view(5, 20))
        torch.testing.assert_close(model(x), expected)

    def test_starts_as_an_identity_transform_that_can_learn(self, x):
        model = self.mlp(init_weights=True)
        with model.disable_adapter():
            expected = model(x)
        assert torch.equal(model(x), expected)
        model.train()
        model(x).square().sum().backward()
        layer = model.base_model.model.lin1
        assert layer.jola_m["default"].grad.abs().sum() > 0
        assert layer.jola_a["default"].grad.abs().sum() > 0

    @pytest.mark.parametrize("log_alpha, gate", [(-5.0, 0.0), (5.0, 1.0)])
    def test_gates_close_and_open_exactly(self, x, log_alpha, gate):
        layer = self.mlp(init_log_alpha=log_alpha).base_model.model.lin1
        scale, shift = layer.get_edit("default")
        assert torch.equal(scale, 1 + gate * layer.jola_m["default"].flatten())
        assert torch.equal(shift, gate * layer.jola_a["default"].flatten())

    def test_gates_are_sampled_in_training_only(self, x):
        model = self.mlp(init_log_alpha=0.0)
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))

    def test_freeze_gates(self, x):
        model = self.mlp(init_log_alpha=0.0, freeze_gates=True).train()
        assert torch.equal(model(x), model(x))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained
        assert not any("log_alpha" in name for name in trained)
        model.set_adapter("default")
        assert not any(p.requires_grad for name, p in model.named_parameters() if "log_alpha" in name)

    def test_share_of_open_gates_is_what_the_penalty_says(self):
        model = self.mlp(init_log_alpha=-0.5).train()
        layer = model.base_model.model.lin1
        torch.manual_seed(0)
        draws = 4000
        # an edit that is zero comes from a closed gate
        n_open = sum(
            (layer.get_edit("default", sample=True)[1].view(4, 5) != 0).all(-1).sum().item() for _ in range(draws)
        )
        share, expected = n_open / (4 * draws), model.base_model.get_l0_penalty().item()
        # five standard deviations
        assert abs(share - expected) < 5 * (expected * (1 - expected) / (4 * draws)) ** 0.5

    def test_penalty_closes_gates(self):
        model = self.mlp().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = model.base_model.get_l0_penalty()
        before.backward()
        optimizer.step()
        assert model.base_model.get_l0_penalty() < before

    def test_penalty_names_an_unknown_adapter(self):
        with pytest.raises(ValueError, match="No JoLA layer has an adapter named 'other'"):
            self.mlp().base_model.get_l0_penalty("other")

    def test_gate_rate_is_a_learning_rate_of_log_alpha(self):
        for gate_rate in (1.0, 10.0):
            layer = self.mlp(gate_rate=gate_rate).base_model.model.lin1
            (before, _) = layer.get_log_alphas("default")
            with torch.no_grad():
                layer.jola_log_alpha_m["default"].sub_(0.01)
            torch.testing.assert_close(layer.get_log_alphas("default")[0], before - 0.01 * gate_rate)

    @pytest.mark.parametrize("bias", [True, False])
    def test_unmerging_restores_the_weights_exactly(self, x, bias):
        model = self.mlp(bias=bias)
        layer = model.base_model.model.lin1.base_layer
        before = copy.deepcopy(layer)
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
        assert torch.equal(layer.weight, before.weight)
        assert (layer.bias is None) == (not bias)
        if bias:
            assert torch.equal(layer.bias, before.bias)

    def test_adapters_that_are_merged_one_after_the_other_apply_in_that_order(self, x):
        model = self.mlp()
        model.add_adapter("other", JolaConfig(target_modules=["lin1"], head_dim=5, init_weights=False))
        model.base_model.set_adapter(["default", "other"])
        expected = model(x)
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
        torch.testing.assert_close(model(x), expected)

    def test_a_bias_that_merging_creates_is_warned_of(self):
        model = get_peft_model(llama(), JolaConfig(init_weights=False))
        with pytest.warns(UserWarning, match="Merging has added a bias to 2 layers that had none"):
            model.merge_and_unload()

    def test_without_additive_edits_merging_creates_no_bias(self, recwarn):
        model = get_peft_model(llama(), JolaConfig(init_weights=False, edit="multiplicative")).merge_and_unload()
        assert model.model.layers[0].self_attn.o_proj.bias is None
        assert not any("Merging has added a bias" in str(warning.message) for warning in recwarn)

    def test_heads_are_read_from_the_model(self):
        model = get_peft_model(llama(), JolaConfig())
        layer = model.base_model.model.model.layers[0].self_attn.o_proj
        assert (layer.num_heads, layer.head_dim) == (4, 8)

    def test_a_model_without_declared_heads_is_warned_of(self):
        with pytest.warns(UserWarning, match="its input is edited as one head"):
            get_peft_model(MLP(), JolaConfig(target_modules=["lin1"]))

    def test_saved_and_loaded(self, tmp_path):
        model = get_peft_model(llama(), JolaConfig(init_weights=False, gate_rate=3.0, init_log_alpha=0.3))
        inputs = torch.arange(12).view(2, 6)
        with torch.no_grad():
            model.base_model.model.model.layers[1].self_attn.o_proj.jola_unit_a["default"].fill_(0.25)
            expected = model(inputs).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded(inputs).logits, expected)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"edit": "scale"}, "`edit` must be"),
            ({"temperature": 0.0}, "`temperature` must be positive"),
            ({"gate_rate": 0.0}, "`gate_rate` must be positive"),
            ({"stretch": (0.0, 1.1)}, "`stretch` must be"),
            ({"head_dim": 0}, "`head_dim` must be at least 1"),
            ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
            (
                {"layers_to_transform": [0], "target_modules": ".*lin1"},
                "cannot be used when `target_modules` is a str",
            ),
        ],
    )
    def test_bad_values_are_named(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            JolaConfig(**kwargs)

    def test_a_head_size_that_does_not_divide_the_input_is_named(self):
        with pytest.raises(ValueError, match="`head_dim` 3 does not divide the 20 input features of lin1"):
            get_peft_model(MLP(), JolaConfig(target_modules=["lin1"], head_dim=3))
