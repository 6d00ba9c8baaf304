"""Rotary position embeddings: tables of angles from position ids, and their application.

Halves layout throughout (Hugging Face's): dimension i turns with dimension i + K/2. Tables are always float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import IntermodalError


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_context: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Yarn's scale of the tables; None is `0.1 ln(factor) + 1`."""
    sections: tuple[int, ...] | None = None
    """M-RoPE: how many of the K/2 frequencies read the time, height and width position; None is one position a token."""
    interleaved: bool = False
    """Qwen3-VL: the three axes alternate (THWTHW...TT) instead of lying in blocks (T..TH..HW..W)."""

    def frequencies(self, head: int) -> tuple[Tensor, float]:
        """(K/2,) angular frequencies in radians a position, and the factor the tables are multiplied by.

        Sources: Hugging Face `modeling_rope_utils.py` (`llama3`, `yarn`, `linear`); YaRN (arXiv 2309.00071) section 3.
        """
        exponents = torch.arange(0, head, 2, dtype=torch.int64).float() / head
        plain = 1.0 / self.theta**exponents
        if self.kind == "linear":
            return plain / self.factor, 1.0
        if self.kind == "llama3":
            wavelength = 2 * math.pi / plain
            low, high = self.original_context / self.low_freq_factor, self.original_context / self.high_freq_factor
            share = (self.original_context / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            between = (1 - share) * plain / self.factor + share * plain
            slow = torch.where(wavelength > low, plain / self.factor, plain)
            return torch.where((wavelength <= low) & (wavelength >= high), between, slow), 1.0
        if self.kind == "yarn":

            def dimension(rotations: float) -> float:
                return head * math.log(self.original_context / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

            first, last = max(math.floor(dimension(self.beta_fast)), 0), min(math.ceil(dimension(self.beta_slow)), head - 1)
            ramp = ((torch.arange(head // 2).float() - first) / max(last - first, 0.001)).clamp(0, 1)
            scale = self.attention_factor
            if scale is None:
                scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
            return plain / self.factor * ramp + plain * (1 - ramp), scale
        if self.kind != "default":
            raise IntermodalError(f"unknown rope kind {self.kind!r}: default, linear, llama3 or yarn")
        return plain, 1.0


def axis_of_frequency(sections: tuple[int, ...], interleaved: bool) -> Tensor:
    """(K/2,) which of the axes (0 time, 1 height, 2 width) each frequency reads.

    Chunked (Qwen2-VL): T then H then W. Interleaved (Qwen3-VL): H at 1, 4, ..., W at 2, 5, ..., up to three times their section;
    T everywhere else, the tail included (Hugging Face `modeling_qwen3_vl.py:406-415`).
    """
    if not interleaved:
        return torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections))
    axis = torch.zeros(sum(sections), dtype=torch.long)
    for which in range(1, len(sections)):
        axis[which : 3 * sections[which] : 3] = which
    return axis


class Rope:
    """Angle tables of one decoder. Not a module: it holds nothing that is trained or saved."""

    def __init__(self, config: RopeConfig, head: int):
        if config.sections is not None and sum(config.sections) != head // 2:
            raise IntermodalError(f"rope sections {config.sections} sum to {sum(config.sections)}, not to half a head, {head // 2}")
        self.config, self.head = config, head
        with torch.device("cpu"):  # whatever the default device: a model built on "meta" still needs these numbers
            self.inverse, self.scale = config.frequencies(head)
            self.axis = None if config.sections is None else axis_of_frequency(config.sections, config.interleaved)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Position ids (T,) or, for M-RoPE, (3, T) -> what `rotate` takes, (T, 1, K) in `dtype`, ready to broadcast over heads.

        M-RoPE also takes (T,): text alone, all three axes equal.
        """
        inverse = self.inverse.to(positions.device)
        if positions.ndim == 1:
            angles = positions[:, None].float() * inverse
        elif self.axis is None:
            raise ValueError("three position axes for a decoder that has one: its rope has no sections")
        else:
            angles = positions.float()[self.axis.to(positions.device)].T * inverse
        if dtype == torch.float64:  # exactness tests: the angles stay those of float32
            angles = angles.double()
        return turns(angles, dtype, self.scale)


def turns(angles_TK2: Tensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Angles (T, K/2) -> what `rotate` takes, (T, 1, K) in `dtype`: cosines, and sines that are negative in the first half."""
    cos, sin = ((table * scale).to(dtype) for table in (angles_TK2.cos(), angles_TK2.sin()))
    return torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]


def rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of (T, H, K) by its angle; tables as `turns` gives them. Three operators, for in decoding each costs more
    than what it computes."""
    return torch.addcmul(x_THK * cos, x_THK.roll(x_THK.shape[-1] // 2, -1), sin)
