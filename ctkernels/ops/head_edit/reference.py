"""The head edit in plain torch: z' = (1 + g_m m) z + g_a a, for parameters that broadcast against z.

Products of parameters are computed in the parameters' own precision: a closed gate cancels values too large for z's dtype.
"""

from __future__ import annotations

from torch import Tensor


def scale(m: Tensor | None, g_m: Tensor | None) -> Tensor | None:
    """1 + g_m m; None without m."""
    if m is None:
        return None
    return 1 + (m if g_m is None else g_m * m)


def offset(a: Tensor | None, g_a: Tensor | None) -> Tensor | None:
    """g_a a; None without a."""
    if a is None or g_a is None:
        return a
    return g_a * a


def forward(z: Tensor, m: Tensor | None, a: Tensor | None, g_m: Tensor | None, g_a: Tensor | None) -> Tensor:
    p, q = scale(m, g_m), offset(a, g_a)
    y = z if p is None else p.to(z.dtype) * z
    return y if q is None else y + q.to(z.dtype)


def partials(
    z: Tensor, m: Tensor | None, a: Tensor | None, g_m: Tensor | None, g_a: Tensor | None
) -> tuple[Tensor | float, ...]:
    """d/dz, d/dm, d/da, d/dg_m, d/dg_a, elementwise."""
    p = scale(m, g_m)
    d_m = z if g_m is None else g_m * z
    return (
        1.0 if p is None else p.to(z.dtype),
        d_m,
        1.0 if g_a is None else g_a,
        0.0 if m is None else m * z,
        0.0 if a is None else a,
    )
