"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with Llama 3.1's frequency scaling.

Owns the angles, computed from config numbers for a batch's positions, and their application. Pairs are interleaved
(dims 2i and 2i + 1), as in Meta's LLaMA and torchtitan; Hugging Face pairs dims i and i + head_dim / 2 instead and
permutes wq and wk to match. Refuses caches and buffers: nothing here has to survive a meta device.
"""

import math

import torch
from torch import Tensor

from titanlite.config.sections import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair: float64 [head_dim / 2].

    Scaling as in Meta's llama-models, models/llama3/model.py, `apply_scaling`: a pair that turns fewer than
    low_freq_factor times in the original context is slowed by the factor, one that turns more than high_freq_factor
    times is left alone, and the blend in between is linear in the number of turns.
    """
    head_dim = config.head_size
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling_factor == 1.0:
        return frequencies
    turns = config.rope_original_max_seq_len * frequencies / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_scaling_factor)


def rope_rotations(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of each pair's angle for positions [B, S]: [B, S, head_dim / 2, 2] of dtype.

    Computed in float64, since the angle of position 100,000 is off by 0.004 radians in float32.
    """
    angles = positions.unsqueeze(-1) * inverse_frequencies(config, positions.device)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).to(dtype)


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate x [B, S, H, head_dim] in float32, or in what is wider of x and the rotations; the result has x's dtype."""
    wide = torch.promote_types(torch.promote_types(x.dtype, rotations.dtype), torch.float32)
    pairs, rotations = x.to(wide).unflatten(-1, (-1, 2)), rotations.to(wide).unsqueeze(2)
    if torch.compiler.is_compiling():  # the compiler fuses single operations, and knows no complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), rotations.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    else:  # one pass over memory, where each of those is one
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))
    return rotated.flatten(-2).to(x.dtype)
