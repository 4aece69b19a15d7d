"""Names of everything that the library sets on a user's modules. docs/left_on_models.md: who sets and removes each."""

from __future__ import annotations

# Entries of a module's ``__dict__``.
UNITS = "_ctu"  # on a steered module: {key of a site: its unit}
SPEC = "_ctu_spec"  # on a steered activation module: its ActivationSpec
STEERING = "_ctu_handle"  # on a model: the handle of `steer`
FUSION = "_ctu_fusion"  # on a model: the handle of `fuse`
CURVATURE = "_ctu_curvature"  # on a model: the sites and layers of its `CurvatureConfig` adapters
ATTENTION_FUSION = "_jola_fusion"  # on a model: the handle of `fuse_attention`
POOLS = "_ctu_pools"  # on a model: the `AdapterPool`s that serve it, by method
FORWARD = "forward"  # on modules and max poolings that `fuse` fuses, and on attention that `fuse_attention` records
SAVE_PRETRAINED = "save_pretrained"  # on a transformers model with CT units: raises an error

ATTRIBUTES = frozenset(
    (UNITS, SPEC, STEERING, FUSION, CURVATURE, ATTENTION_FUSION, POOLS, FORWARD, SAVE_PRETRAINED),
)
ON_STEERED = (UNITS, SPEC)
# Shared by a module and its shadow while `fuse` traces its forward, which does not write to them.
SHARED = frozenset((UNITS, SPEC, STEERING, FUSION))

# Attributes of a steered module's class.
BASE = "_ctu_base"  # the original class
RECIPE = "_ctu_recipe"  # the arguments of `steered_class`, for copies and pickles

# Entries of ``_modules``: this, or this followed by an underscore and the key of a site.
CHILD = "ctu"
# Entry of ``_modules`` of a block: the layer that edits its output.
BLOCK_OUTPUT = "block_output"
