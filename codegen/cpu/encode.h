// Finds the blocks of a form in float32 values, as ir/narrow.py does: of each 32 values a float16 step, perhaps a float16
// minimum, and a level each, of which the values are made bit by bit. A few likely levels of the outermost values are
// tried; where none fits, nothing is said of the weight, and narrow.py looks on.
#pragma once

#include <c10/util/Half.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "forms.h"

namespace treespec {

constexpr int GROUP = 32;
typedef int32_t vi_at4 __attribute__((vector_size(VW * 4), aligned(4), may_alias));

using Tries = std::vector<std::pair<int, int>>;  // levels of the least and of the largest value

struct Found {
  float step, least;
  int32_t levels[GROUP];
};

inline float as_half(float x) { return static_cast<float>(c10::Half(x)); }

// NOTE bits are compared: -0.0 is another number than 0.0, and a value that is not finite has no step.
inline vi other_bits(vf made, vf values) { return reinterpret_cast<vi>(made) ^ reinterpret_cast<vi>(values); }

inline bool all_zero(vi bits) {
  int32_t any = 0;
  for (int i = 0; i < VW; ++i) any |= bits[i];
  return any == 0;
}

// Levels of the values for `found.step` and `found.least`; whether these make the values, bit by bit.
template <bool minimum>
inline bool take_levels(const float* values, int lowest, int highest, Found& found) {
  const float divisor = found.step == 0 ? 1 : found.step;
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer, to an even one of two
  const vf bottom = splat(float(lowest)), top = splat(float(highest));
  vi other = {};
  for (int i = 0; i < GROUP; i += VW) {
    const vf value = load(values + i);
    vf level = (value - found.least) / divisor;
    level = level > bottom ? level : bottom;  // NaN: lowest
    level = level < top ? level : top;
    level = level + magic - magic;
    *reinterpret_cast<vi_at4*>(found.levels + i) = __builtin_convertvector(level, vi);
    // a level times a float16 step is exact (11 and 8 bits), so that one instruction for both rounds as two do; without a
    // minimum nothing is added, which would turn -0.0 to 0.0
    other |= other_bits(minimum ? level * found.step + found.least : level * found.step, value);
  }
  return all_zero(other);
}

inline bool find_levels(const float* values, int lowest, int highest, bool minimum, const Tries& tries, Found& found) {
  vf least = load(values), most = least;
  vi infinite = {};
  for (int i = 0; i < GROUP; i += VW) {
    const vf value = load(values + i);
    infinite |= (reinterpret_cast<vi>(value) & 0x7f800000) == 0x7f800000;
    least = value < least ? value : least, most = value > most ? value : most;
  }
  if (!all_zero(infinite)) return false;
  float low = least[0], high = most[0];
  for (int i = 1; i < VW; ++i) low = std::min(low, least[i]), high = std::max(high, most[i]);
  for (const auto& [below, above] : tries) {
    if (minimum) {
      found.step = as_half((high - low) / float(above - below));
      found.least = as_half(low - float(below) * found.step);
    } else {
      found.step = as_half((-low > high ? low : high) / float(above));
      found.least = 0;
    }
    if (!std::isfinite(found.step) || !std::isfinite(found.least)) continue;
    if (minimum ? take_levels<true>(values, lowest, highest, found) : take_levels<false>(values, lowest, highest, found))
      return true;
  }
  return false;
}

// Writes output `j` of a block of `BITS` bits a level: layouts are those of forms.h.
template <int BITS>
inline void write_output(char* block, int j, bool minimum, int lowest, const Found& found) {
  const auto half = [&](char* to, float x) {
    const uint16_t bits = c10::Half(x).x;
    std::memcpy(to + 2 * j, &bits, 2);
  };
  const auto word = [&](char* to, uint32_t bits) { std::memcpy(to + 4 * j, &bits, 4); };
  half(block, found.step), block += 2 * PANEL;
  if (minimum) half(block, found.least), block += 2 * PANEL;
  if constexpr (BITS == 8) {
    for (int i = 0; i < GROUP; ++i) block[i * PANEL + j] = char(int8_t(found.levels[i]));
  } else {
    if (BITS == 5) {
      uint32_t fifths = 0;
      for (int i = 0; i < GROUP; ++i) fifths |= uint32_t((found.levels[i] - lowest) >> 4) << i;
      word(block, fifths), block += 4 * PANEL;
    }
    for (int eighth = 0; eighth < 4; ++eighth, block += 4 * PANEL) {
      uint32_t bits = 0;
      for (int i = 0; i < 8; ++i) bits |= uint32_t((found.levels[8 * eighth + i] - lowest) & 15) << 4 * i;
      word(block, bits);
    }
  }
}

// One panel of a weight [rows, columns], from row `first` on; zeros past the last row. False: not found.
template <int BITS>
inline bool encode_panel(
    const float* weight, int64_t rows, int64_t columns, int64_t first, bool minimum, const Tries& tries, char* to) {
  const int lowest = minimum ? 0 : -(1 << (BITS - 1)), highest = lowest + (1 << BITS) - 1;
  const int64_t bytes = (minimum ? 4 : 2) * PANEL + (BITS == 8 ? 32 : BITS == 5 ? 20 : 16) * PANEL;
  const float zeros[GROUP] = {};
  Found found;
  for (int64_t k = 0; k < columns; k += GROUP, to += bytes)
    for (int j = 0; j < PANEL; ++j) {
      const float* values = first + j < rows ? weight + (first + j) * columns + k : zeros;
      if (!find_levels(values, lowest, highest, minimum, tries, found)) return false;
      write_output<BITS>(to, j, minimum, lowest, found);
    }
  return true;
}

}  // namespace treespec
