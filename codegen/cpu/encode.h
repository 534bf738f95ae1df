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
using Tries = std::vector<std::pair<int, int>>;  // levels of the least and of the largest value

struct Found {
  float step, least;
  int32_t levels[GROUP];
};

inline float as_half(float x) { return static_cast<float>(c10::Half(x)); }

// NOTE bits are compared: -0.0 is another number than 0.0, and a value that is not finite has no step.
inline bool same_values(const float* values, const Found& found) {
  int32_t other = 0;
  for (int i = 0; i < GROUP; ++i) {
    // the product is exact (11 and 8 bits), so that one instruction for both rounds as two do
    const float made = float(found.levels[i]) * found.step + found.least;
    int32_t a, b;
    std::memcpy(&a, &made, 4), std::memcpy(&b, values + i, 4);
    other |= a ^ b;
  }
  return other == 0;
}

// The same without a minimum: nothing is added, which would turn -0.0 to 0.0.
inline bool same_products(const float* values, const Found& found) {
  int32_t other = 0;
  for (int i = 0; i < GROUP; ++i) {
    const float made = float(found.levels[i]) * found.step;
    int32_t a, b;
    std::memcpy(&a, &made, 4), std::memcpy(&b, values + i, 4);
    other |= a ^ b;
  }
  return other == 0;
}

inline bool find_levels(const float* values, int lowest, int highest, bool minimum, const Tries& tries, Found& found) {
  float low = values[0], high = values[0];
  uint32_t infinite = 0;
  for (int i = 0; i < GROUP; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    infinite |= (bits & 0x7f800000u) == 0x7f800000u;
    low = std::min(low, values[i]), high = std::max(high, values[i]);
  }
  if (infinite) return false;
  for (const auto& [below, above] : tries) {
    if (minimum) {
      found.step = as_half((high - low) / float(above - below));
      found.least = as_half(low - float(below) * found.step);
    } else {
      found.step = as_half((-low > high ? low : high) / float(above));
      found.least = 0;
    }
    if (!std::isfinite(found.step) || !std::isfinite(found.least)) continue;
    const float divisor = found.step == 0 ? 1 : found.step;
    for (int i = 0; i < GROUP; ++i) {
      const float level = std::nearbyint((values[i] - found.least) / divisor);
      found.levels[i] = int32_t(level > lowest ? std::min(level, float(highest)) : float(lowest));  // NaN: lowest
    }
    if (minimum ? same_values(values, found) : same_products(values, found)) return true;
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
