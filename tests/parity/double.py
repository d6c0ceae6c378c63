"""Run transformers' models in double precision, as the reference for two float32 programs."""

from __future__ import annotations

import torch


def in_double(model: torch.nn.Module) -> torch.nn.Module:
    """Convert a model to double precision, with its norms and rotations, which transformers computes in float32."""
    model = model.double()
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: torch.nn.functional.rms_norm(
                x, norm.weight.shape, norm.weight, norm.variance_epsilon
            )
        elif kind.endswith("RotaryEmbedding"):
            module.forward = lambda x, position_ids, rotary=module: _rotations(rotary, position_ids)
    return model


def _rotations(rotary: torch.nn.Module, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of default rotary embeddings, (B, T, head width), in double precision."""
    width = 2 * len(rotary.inv_freq)
    powers = torch.arange(0, width, 2, dtype=torch.float64) / width
    theta = rotary.config.rope_parameters["rope_theta"]
    angles = positions[..., None].double() / theta**powers
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
