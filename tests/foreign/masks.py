"""Masks in the ways that people write them, of T tokens: each gives what scaled_dot_product_attention takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Mask = Callable[[int], Tensor]
CONVERTED: dict[str, Mask] = {}
REFUSED: dict[str, Mask] = {}


def converts(mask: Mask) -> Mask:
    CONVERTED[mask.__name__] = mask
    return mask


def refused(mask: Mask) -> Mask:
    REFUSED[mask.__name__] = mask
    return mask


@converts
def boolean_product(t: int) -> Tensor:
    i = torch.arange(t)
    return (i[None] <= i[:, None]) * (i[:, None] - i[None] < 5)


@converts
def near_by_absolute_distance(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return ((q - k).abs() < 5) & (k <= q)


@converts
def window_no_longer_than_the_text(t: int) -> Tensor:
    i = torch.arange(t)
    return (i[None] <= i[:, None]) & (i[:, None] - i[None] < min(t, 5))


@converts
def window_by_triangles_of_the_text(t: int) -> Tensor:
    ones = torch.ones(t, t, dtype=torch.bool)
    return ones.tril() & ones.triu(-min(6, t))


@converts
def meshgrid_of_positions(t: int) -> Tensor:
    q, k = torch.meshgrid(torch.arange(t), torch.arange(t), indexing="ij")
    return q >= k


@converts
def blocks_by_shifts(t: int) -> Tensor:
    i = torch.arange(t)
    return ((i[:, None] >> 2) == (i[None] >> 2)) & (i[:, None] >= i[None])


@converts
def blocks_by_whole_division(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return ((q // 4) == (k // 4)) & (k <= q)


@converts
def blocks_by_truncated_division(t: int) -> Tensor:
    b = torch.div(torch.arange(t), 4, rounding_mode="trunc")
    return (b[:, None] == b[None]) & (torch.arange(t)[:, None] >= torch.arange(t))


@converts
def logarithm_of_ones(t: int) -> Tensor:
    return torch.ones(t, t).tril().log()


@converts
def triangle_filled(t: int) -> Tensor:
    m = torch.tril(torch.ones(t, t))
    return m.masked_fill(m == 0, -math.inf).masked_fill(m == 1, 0.0)


@converts
def one_minus_times_lowest(t: int) -> Tensor:
    return (1.0 - torch.ones(t, t).tril()) * torch.finfo(torch.float32).min


@converts
def redundant_conditions(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return (k <= q) & (k < t) & (q >= 0) & (k + 1 > 0) & (q - k < t)


@converts
def product_of_zeros_and_ones(t: int) -> Tensor:
    m = torch.ones(t, t).tril() * torch.ones(t, t).triu(-6)
    return torch.zeros(t, t).masked_fill(m == 0, -1e9)


@converts
def whole_numbers(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.int32).tril().to(torch.bool)


@converts
def square_subsequent(t: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(t)


@converts
def square_subsequent_of_old(t: int) -> Tensor:
    mask = (torch.triu(torch.ones(t, t)) == 1).transpose(0, 1)
    return mask.float().masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)


@converts
def exclusive_or(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool) ^ torch.ones(t, t, dtype=torch.bool).triu(1)


@converts
def running_sum(t: int) -> Tensor:
    place = torch.ones(t, dtype=torch.long).cumsum(0)
    return place[:, None].ge(place[None])


@converts
def sign_of_the_distance(t: int) -> Tensor:
    d = torch.arange(t)[:, None] - torch.arange(t)[None]
    return d.sign() >= 0


@converts
def bytes_subtracted(t: int) -> Tensor:
    return (1 - torch.triu(torch.ones((1, t, t), dtype=torch.uint8), diagonal=1)) == 1


@converts
def rows_repeated(t: int) -> Tensor:
    k = torch.arange(t).unsqueeze(0).repeat(t, 1)
    q = torch.arange(t).unsqueeze(1).expand(t, t)
    return torch.where(k > q, torch.tensor(False), torch.tensor(True))


@converts
def window_of_two_triangles(t: int) -> Tensor:
    ones = torch.ones(t, t, dtype=torch.bool)
    return torch.logical_and(ones.tril(), ~ones.tril(-5))


@converts
def meshgrid_of_columns(t: int) -> Tensor:
    k, q = torch.meshgrid(torch.arange(t), torch.arange(t), indexing="xy")
    return (q - k < 6) & (q >= k)


@converts
def outer_difference(t: int) -> Tensor:
    i = torch.arange(t)
    return torch.subtract(i.view(-1, 1), i.view(1, -1)).greater_equal(0)


@converts
def padded_triangle(t: int) -> Tensor:
    return torch.nn.functional.pad(torch.ones(t, t, dtype=torch.bool).tril(), (1, 0))[:, 1:]


@converts
def less_than_with_a_shift(t: int) -> Tensor:
    return torch.arange(t) < torch.arange(1, t + 1)[:, None]


@converts
def first_tokens_and_a_window(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return (k <= q) & ((k < 3) | (q - k < 5))


@converts
def first_tokens_and_a_window_as_numbers(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    hidden = (k > q) | ((q - k >= 5) & (k >= 2))
    return torch.zeros(t, t).masked_fill(hidden, -math.inf)


@converts
def first_tokens_written_into_a_band(t: int) -> Tensor:
    m = torch.ones(t, t).tril() * torch.ones(t, t).triu(-4)
    m[:, :2] = 1
    return m.tril().bool()


@converts
def every_second(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return (k <= q) & ((q - k) % 2 == 0)


@converts
def near_ones_and_every_fourth(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return (k <= q) & ((q - k < 4) | (k % 4 == 3))


FIRST_AND_NEAR = first_tokens_and_a_window(64)
DOCUMENTS = torch.tensor([0] * 9 + [1] * 14 + [2] * 41)


@converts
def buffer_of_first_tokens_and_a_window(t: int) -> Tensor:
    return FIRST_AND_NEAR[:t, :t]


@converts
def documents_by_constants(t: int) -> Tensor:
    return (DOCUMENTS[:t, None] == DOCUMENTS[None, :t]) & torch.ones(t, t, dtype=torch.bool).tril()


@converts
def bias_by_key_position(t: int) -> Tensor:
    later = torch.full((t, t), -math.inf).triu(1)
    return later + torch.linspace(-1, 1, 64)[:t].sin()


@converts
def bias_by_key_position_computed(t: int) -> Tensor:
    return torch.full((t, t), -math.inf).triu(1) + (torch.arange(t) * 0.7).cos()[None]


PLACES = torch.linspace(-1, 1, 64).sin()


@converts
def bias_by_key_position_of_a_table(t: int) -> Tensor:
    return torch.full((t, t), -math.inf).triu(1) + PLACES[None, :t]


@converts
def segments_that_are_counted(t: int) -> Tensor:
    """Each begins where a place is a multiple of six."""
    segment = (torch.arange(t) % 6).eq(0).cumsum(0)
    return segment[:, None].eq(segment) & torch.ones(t, t, dtype=torch.bool).tril()


@converts
def one_segment(t: int) -> Tensor:
    segment = torch.arange(t).eq(0).cumsum(0)
    return segment[:, None].eq(segment) & torch.ones(t, t, dtype=torch.bool).tril()


@converts
def diagonal_summed_up(t: int) -> Tensor:
    return torch.eye(t).cumsum(0).gt(0)


@converts
def sum_of_waves(t: int) -> Tensor:
    """A bias of the distance, out of ops that have no closed form (Sandwich)."""
    i = torch.arange(t)
    away = (i[:, None] - i).abs()[..., None] / 10 ** torch.arange(4)
    return torch.full((t, t), -math.inf).triu(1) + away.cos().sum(-1)


@converts
def bias_by_both_places(t: int) -> Tensor:
    i = torch.arange(t)
    return torch.full((t, t), -math.inf).triu(1) + (i - i[:, None]) / (i[:, None] + 2.0)


PAIRS = torch.linspace(-2, 2, 64 * 64).mul(37).sin().view(64, 64)


@converts
def bias_of_a_buffer_of_pairs(t: int) -> Tensor:
    return torch.full((t, t), -math.inf).triu(1) + PAIRS[:t, :t]


@refused
def bias_of_the_last_pairs(t: int) -> Tensor:
    return torch.full((t, t), -math.inf).triu(1) + PAIRS[-t:, -t:]


@refused
def bias_by_both_places_and_the_length(t: int) -> Tensor:
    i = torch.arange(t)
    return torch.full((t, t), -math.inf).triu(1) + (i * i[:, None] / t).cos()


@refused
def segments_from_the_end(t: int) -> Tensor:
    segment = (torch.arange(t) % 6).eq(0).flip(0).cumsum(0)
    return segment[:, None].eq(segment) & torch.ones(t, t, dtype=torch.bool).tril()


@refused
def segments_of_one_length_alone(t: int) -> Tensor:
    """All is one segment, but in a text of 900 tokens."""
    segment = (torch.arange(t) * (t * t % 4093 == 3639)).cumsum(0)
    return segment[:, None].eq(segment) & torch.ones(t, t, dtype=torch.bool).tril()


@refused
def window_that_grows_with_the_text(t: int) -> Tensor:
    i = torch.arange(t)
    return (i[None] <= i[:, None]) & (i[:, None] - i[None] < max(t - 4, 8))


@converts
def own_key_far_below(t: int) -> Tensor:
    """As in Reformer: a token sees itself where nothing comes before it."""
    bias = torch.zeros(t, t).masked_fill(torch.eye(t, dtype=torch.bool), -5e4)
    return bias.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf)


@converts
def own_key_far_below_by_places(t: int) -> Tensor:
    i = torch.arange(t)
    return torch.where(i[:, None] == i, -1e5, 0.0).masked_fill(i[:, None] < i, -1e9)


@refused
def own_key_as_far_as_later_ones(t: int) -> Tensor:
    """The first token sees all."""
    return torch.zeros(t, t).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(), -1e9)


@refused
def own_key_below_later_ones(t: int) -> Tensor:
    bias = torch.zeros(t, t).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -1e5)
    return bias.masked_fill(torch.eye(t, dtype=torch.bool), -1e9)


@refused
def later_keys_little_below_the_own(t: int) -> Tensor:
    i = torch.arange(t)
    return torch.where(i[:, None] == i, -5e4, 0.0).masked_fill(i[:, None] < i, -50005.0)


@refused
def one_ahead(t: int) -> Tensor:
    return torch.arange(t) <= torch.arange(1, t + 1)[:, None]


@refused
def near_on_both_sides(t: int) -> Tensor:
    return (torch.arange(t)[:, None] - torch.arange(t)[None]).abs() < 5


@refused
def prefix_sees_itself(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return (k <= q) | (k < 4)


@refused
def half_of_the_tokens(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return (k <= q) & (k >= t - 40)


@refused
def weak_hiding(t: int) -> Tensor:
    return torch.ones(t, t).triu(1) * -50.0


@refused
def first_tokens_seen_by_all(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return ((k <= q) & (q - k < 5)) | (k < 3)


@refused
def only_the_first_tokens(t: int) -> Tensor:
    q, k = torch.arange(t)[:, None], torch.arange(t)[None]
    return (k <= q) & (k < 3)


@refused
def documents_that_run_backwards(t: int) -> Tensor:
    return (DOCUMENTS[:t, None] != DOCUMENTS[None, :t]) & torch.ones(t, t, dtype=torch.bool).tril()
