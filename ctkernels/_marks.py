"""The names of everything that the library leaves on a user's model; docs/left_on_models.md says who sets and removes it.

A module's ``__dict__`` also holds what torch itself looks up there: a ``forward``, a ``save_pretrained``.
"""

from __future__ import annotations

UNITS = "_ctu"  # on a steered module, {key of the site in it: what computes the site}
SPEC = "_ctu_spec"  # on a steered activation module, how it is read as an activation
STEERING = "_ctu_handle"  # on a model, the handle of `steer`
FUSION = "_ctu_fusion"  # on a model, the handle of `fuse`
CURVATURE = "_ctu_curvature"  # on a model, the sites and layers of its `CurvatureConfig` adapters
ATTENTION_FUSION = "_jola_fusion"  # on a model, the handle of `fuse_attention`
JOLA_ABOVE = "_above"  # on a JoLA layer that another one wraps, the layer around it

ON_MODULES = (UNITS, SPEC)
ON_MODELS = (STEERING, FUSION, CURVATURE, ATTENTION_FUSION)
# Shared by a module and the copy of it whose forward `fuse` reads: reading does not write there.
SHARED = (UNITS, SPEC, STEERING, FUSION)
