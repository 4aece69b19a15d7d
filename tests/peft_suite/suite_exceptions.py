"""The rows of peft's tests that fail on purpose: a regular expression over the test's name, and the reason."""

from __future__ import annotations

# A handful that takes seconds, for the ordinary test suite.
FAST = (
    r"test_(only_params_are_updated|merge_layers|save_pretrained)\[MLP (JoLA, soft gates|CT, layer)-"
    r"|test_mixed_adapter_batches_(base_model|lora_hot_swap|length_mismatch_raises)\[JoLA"
)

EXCEPTIONS: dict[str, str] = {
    r"_pickle\[": "pickled weights are refused: to unpickle is to run code",
    r"test_only_params_are_updated\[.*JoLA(?!, soft)": (
        "most gates sample exactly 1, and their log alphas then have no gradient; the row with soft gates passes"
    ),
    r"test_merge_layers(_multi|_nan|_fp16)?\[JolaConfig.*GPTJ": (
        "the test names GPT-J's fc_out, the projection of an MLP, whose input holds no heads"
    ),
    r"test_merge_layers\[JolaConfig.*(qwen2|T5)": (
        "save_pretrained drops the bias that merging made, which these architectures have no place for; merging warns "
        "of it, and save_merged refuses"
    ),
    r"test_disable_adapters(_with_merging)?\[.*CT": (
        "the test expects a new adapter to change nothing; the paper's start, beta 0.8 and coeff 0.5, is not the ReLU"
    ),
    r"test_only_params_are_updated\[Conv2d CT": (
        "its inputs reach 90: so far from the bend a unit is its activation, and beta and coeff have no gradient"
    ),
    r"test_adapter_dtype_autocast\[(True|False)-False-dtype[01]-.*CT": (
        "an activation has no weight whose dtype its beta and coeff could take: they are float32"
    ),
    r"test_in_features_out_features_exposed\[.*CT": "an activation has no widths",
    (
        r"test_(active_adapter|multiple_active_adapters_forward|multiple_active_adapters_merge_and_unmerge|"
        r"merge_layers_multi|sequential_merge_matches_batch_merge|unmerge_after_sequential_merge_restores_base)\[.*CT"
    ): "of Curvature Tuning one adapter can be active at a time, and more are refused",
}
