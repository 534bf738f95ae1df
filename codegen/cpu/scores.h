// What attention does with a row of scores before the softmax: softcap, ALiBi, bias by distance (ir/scores.py).
#pragma once
#include <algorithm>

#include "vec.h"

namespace treespec {

constexpr float LOG2E = 1.44269504f;  // exp(x) = 2^(x log2 e)

struct Scoring {
  float softcap;        // 0: none
  const float* slopes;  // [heads], or null
  const float* bias;    // [heads, distances], or null; of node n the ones at n * bias_node
  int64_t bias_node, distances;
  const float* sinks;  // [heads], or null
  bool changes() const { return softcap != 0 || by_distance(); }
  bool by_distance() const { return slopes || bias; }
};

// tanh, absolute error < 2e-7, and relative to x where |x| < 1/4; NaN for NaN.
TS_INLINE vf tanh_of(vf x) {
  const vf size = x < 0 ? -x : x, square = x * x;
  const vf series = x + x * square * (-1 / 3.f + square * (2 / 15.f + square * (-17 / 315.f + square * (62 / 2835.f))));
  const vf e = exp2_nonpositive(size * (-2 * LOG2E)), large = (1 - e) / (1 + e);
  return size < 0.25f ? series : x < 0 ? -large : large;
}

// Scores s of `vectors` vectors of keys, at these distances from the node, times log2 e. The head's own slope and bias.
inline void change_scores(const Scoring& by, int64_t node, int64_t head, const int32_t* distance, int vectors, float* s) {
  const float slope = by.slopes ? by.slopes[head] : 0, softcap = by.softcap;
  const float* bias = by.bias ? by.bias + node * by.bias_node + head * by.distances : nullptr;
  const int32_t last = int32_t(by.distances - 1);
  for (int j = 0; j < vectors * VW; j += VW) {
    vf x = load(s + j);
    if (softcap != 0) x = softcap * tanh_of(x / softcap);
    if (by.slopes) {
      vi far;
      std::memcpy(&far, distance + j, sizeof(far));
      x -= slope * __builtin_convertvector(far, vf);
    }
    if (bias) {
      float own[VW];
      for (int i = 0; i < VW; ++i) own[i] = bias[std::clamp(distance[j + i], 0, last)];
      x += load(own);
    }
    store(s + j, x * LOG2E);
  }
}

}  // namespace treespec
