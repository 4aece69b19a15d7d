"""The names of everything that the library leaves on a user's modules. docs/left_on_models.md: who sets and removes it."""

from __future__ import annotations

# Entries of a module's ``__dict__``.
UNITS = "_ctu"  # of a steered module, {key of a site in it: what computes the site}
SPEC = "_ctu_spec"  # of a steered activation module, how it is read as an activation
STEERING = "_ctu_handle"  # of a model, the handle of `steer`
FUSION = "_ctu_fusion"  # of a model, the handle of `fuse`
CURVATURE = "_ctu_curvature"  # of a model, the sites and layers of its `CurvatureConfig` adapters
ATTENTION_FUSION = "_jola_fusion"  # of a model, the handle of `fuse_attention`
POOLS = "_ctu_pools"  # of a model, the `AdapterPool`s that serve it, by method
FORWARD = "forward"  # of what `fuse` reads, of its max poolings, of the attention that `fuse_attention` records
SAVE_PRETRAINED = "save_pretrained"  # of a transformers model with CT units, a refusal

ATTRIBUTES = frozenset(
    (UNITS, SPEC, STEERING, FUSION, CURVATURE, ATTENTION_FUSION, POOLS, FORWARD, SAVE_PRETRAINED),
)
ON_STEERED = (UNITS, SPEC)
# Shared by a module and the copy of it whose forward `fuse` reads: reading does not write there.
SHARED = frozenset((UNITS, SPEC, STEERING, FUSION))

# Attributes of the class that a steered module has meanwhile.
BASE = "_ctu_base"  # its class before
RECIPE = "_ctu_recipe"  # the arguments that make the class again, for copies and pickles

# Entries of ``_modules``: this, or this with an underscore and the key of a site.
CHILD = "ctu"
# Entry of ``_modules`` of a block: the layer that edits its output.
BLOCK_OUTPUT = "block_output"
