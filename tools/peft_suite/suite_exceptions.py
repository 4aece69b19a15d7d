"""The tests of peft that fail intentionally: a regular expression over the test's name, and the reason."""

from __future__ import annotations

# A few that take seconds, for the regular test suite.
FAST = (
    r"test_(only_params_are_updated|merge_layers|save_pretrained)\[MLP (JoLA, soft gates|CT, layer)-"
    r"|test_(merge_layers|save_pretrained)\[MLP joint CT-"
    r"|test_mixed_adapter_batches_(base_model|lora_hot_swap|length_mismatch_raises)\[(JoLA|joint)"
)

EXCEPTIONS: dict[str, str] = {
    r"_pickle\[": "pickled weights are refused: to unpickle is to run code",
    r"test_only_params_are_updated\[.*JoLA(?!, soft)": (
        "most gates sample exactly 1, and their log alphas then have no gradient; the row with soft gates passes"
    ),
    r"test_(only_params_are_updated|training_custom_models)\[.*joint": (
        "the test knows the adapter's parameters by one prefix; a joint adapter's have those of its methods"
    ),
    r"test_from_pretrained_config_construction\[.*joint": (
        "the test expects the very configuration that was given; a joint adapter keeps a copy, whose parts it settles"
    ),
    r"test_merge_layers(_multi|_nan|_fp16)?\[(Jola|Curvature)Config.*GPTJ": (
        "the test names GPT-J's fc_out, the projection of an MLP: its input holds no heads, and it is no activation"
    ),
    r"test_merge_layers\[JolaConfig.*(qwen2|T5)": (
        "save_pretrained drops the bias that merging made, which these architectures have no place for; merging warns "
        "of it, and save_merged refuses"
    ),
    r"test_disable_adapters(_with_merging)?\[.*CT": (
        "the test expects a new adapter to change nothing; a CT unit starts at a curve, to have a gradient: it is not the "
        "ReLU"
    ),
    r"test_adapter_dtype_autocast\[(True|False)-False-dtype[01]-(?!.*joint).*CT"
    r"|test_add_adapter_no_autocast.*CurvatureConfig(?!.*T5)"
    r"|test_add_adapter_no_autocast.*dtype1-CurvatureConfig.*T5": (
        "an activation has no weight whose dtype its beta and coeff could take: they are float32"
    ),
    r"test_in_features_out_features_exposed\[.*CT": "an activation has no widths",
    (
        r"test_(active_adapter|multiple_active_adapters_forward|multiple_active_adapters_merge_and_unmerge|"
        r"merge_layers_multi|sequential_merge_matches_batch_merge|unmerge_after_sequential_merge_restores_base)\[.*CT"
        r"|test_multiple_active_adapters_with_(same|overlapping|different)_modules_to_save.*CurvatureOnMlp"
    ): "of Curvature Tuning one adapter can be active at a time, and more are refused",
    r"test_(set_adapter_non_overlapping_modules(_to_save)?|set_requires_grad)\[CurvatureOnMlp": (
        "the test looks for adapters in linear layers; these are in the activations behind them"
    ),
    r"test_merge_layers\[CurvatureConfig": (
        "the test saves a merged model as a plain one, which cannot hold a unit: save_pretrained refuses"
    ),
    r"test_merge_layers_multi\[CurvatureConfig": (
        "the test expects two adapters of one configuration to differ by their seeds; nothing in a unit's start is random"
    ),
}
