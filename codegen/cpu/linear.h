// x @ weight.T + bias on packed weights, panels of 32 outputs: each weight is read once for up to a block of rows.
//
// Every output is one chain of K fused multiply-adds in order of k, however many rows there are. A row's result
// therefore does not depend on its neighbours: bitwise the same at M = 1 and at M = 512. A weight that is stored in
// fewer bits is widened to the float32 that it stands for, so that results do not depend on its form either.
#pragma once
#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "forms.h"

namespace treespec {

// How far ahead weights are asked for. Measured on Zen 5, one thread, 24 layers of 1024 x 1024 from DRAM, us a layer:
// 2 KB: M=1 103, M=8 125; 4 KB: 105, 115; 8 KB: 101, 98; 16 KB: 95, 86; 32 KB: 95, 95; 64 KB: 101, 103.
constexpr int64_t PREFETCH = 16 * 1024;
// With two blocks of rows each fetches half of the next panel instead, else DRAM idles in the second. As above, M=16:
// 187 us -> 147, the speed of FMA; with three and more blocks there is nothing to gain. At most half of L2.
constexpr int64_t NEXT_PANEL = 512 * 1024;

// Where the strips of a panel go: columns [0, n) of `out`, and what is fetched meanwhile, `step` bytes for every k.
struct Target {
  const float* bias;  // of PANEL outputs, or null
  float* out;
  int64_t ldo;
  int n;
  const char* ahead;
  int64_t step;
};

// What reads S strips of a panel, from s on.
template <class Form, int S>
TS_INLINE std::array<typename Form::Reader, S> readers_of(const char* panel, int s) {
  using Reader = typename Form::Reader;
  if constexpr (S == 1)
    return {Reader(panel, s)};
  else
    return {Reader(panel, s), Reader(panel, s + 1)};
}

// Strips of a panel that are summed at once for M rows: all, where one alone has fewer chains of additions than hide how
// long an addition takes.
template <class Form>
constexpr int together(int M) {
  return M <= Form::TOGETHER ? STRIPS_A_PANEL : 1;
}

// M rows of x times S strips of a panel, from s on.
template <class Form, int M, int S>
void strip(const float* x, int64_t ldx, const char* panel, int64_t K, int s, const Target& to) {
  vf sum[S][M][COLS];
#pragma GCC unroll 2
  for (int i = 0; i < S; ++i)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) sum[i][m][c] = to.bias ? load(to.bias + Form::column(s + i, c)) : vf{};
  std::array<typename Form::Reader, S> readers = readers_of<Form, S>(panel, s);
  const auto rows = [&](const float* at) __attribute__((always_inline)) {
    vf weight[S][COLS];
#pragma GCC unroll 2
    for (int i = 0; i < S; ++i) readers[i].next(weight[i]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float value = at[m * ldx];
#pragma GCC unroll 2
      for (int i = 0; i < S; ++i)
#pragma GCC unroll 4
        for (int c = 0; c < COLS; ++c) sum[i][m][c] += weight[i][c] * value;
    }
  };
  constexpr int SHARE = Form::BYTES / STRIPS_A_PANEL, LINES = (SHARE * S + 63) / 64;
  const char* ahead = to.ahead + SHARE * s;
  for (int64_t k = 0; k < K; k += Form::K_BLOCK, ahead += to.step * Form::K_BLOCK) {
#pragma GCC unroll 20
    for (int line = 0; line < LINES; ++line) __builtin_prefetch(ahead + line * 64);
#pragma GCC unroll 2
    for (int i = 0; i < S; ++i) readers[i].begin();
    if constexpr (Form::K_BLOCK == 1) {
      rows(x + k);
    } else {
      for (int j = 0; j < Form::K_BLOCK; j += 8) {
#pragma GCC unroll 2
        for (int i = 0; i < S; ++i) readers[i].eight();
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) rows(x + k + j + l);
      }
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < S; ++i)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) {
        const int column = Form::column(s + i, c), left = to.n - column;
        if (left >= VW)
          store(to.out + m * to.ldo + column, sum[i][m][c]);
        else if (left > 0)
          store_first(to.out + m * to.ldo + column, sum[i][m][c], left);
      }
}

using Strip = void (*)(const float*, int64_t, const char*, int64_t, int, const Target&);

// STRIPS<Form>[M]: `strip` for M rows.
template <class Form, size_t... M>
constexpr std::array<Strip, sizeof...(M) + 1> strips_of(std::index_sequence<M...>) {
  return {nullptr, strip<Form, M + 1, together<Form>(M + 1)>...};
}
template <class Form>
constexpr auto STRIPS = strips_of<Form>(std::make_index_sequence<Form::ROWS>());

// Of float32, which many rows of every form are multiplied by: compiled once, in products.cpp.
Strip float32_strip(int rows);

// The panel as float32, [K, PANEL]: what many rows are multiplied with.
template <class Form>
void widen(const char* panel, int64_t K, float* out, const char* ahead) {
  for (int s = 0; s < STRIPS_A_PANEL; ++s) {
    typename Form::Reader reader(panel, s);
    float* to = out;
    const auto row = [&] {
      vf weight[COLS];
      reader.next(weight);
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) store(to + Form::column(s, c), weight[c]);
      to += PANEL;
    };
    for (int64_t k = 0; k < K; k += Form::K_BLOCK, ahead += Form::BYTES / STRIPS_A_PANEL) {
      for (int line = 0; line < Form::BYTES / STRIPS_A_PANEL; line += 64) __builtin_prefetch(ahead + line);
      reader.begin();
      if constexpr (Form::K_BLOCK == 1) {
        row();
      } else {
        for (int i = 0; i < Form::K_BLOCK; i += 8) {
          reader.eight();
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) row();
        }
      }
    }
  }
}

// out[K]: the weights of one output, number `column` of its panel.
template <class Form>
void widen_column(const char* panel, int64_t K, int column, float* out) {
  int s = 0, c = 0;  // the vector that holds it
  for (int i = 0; i < STRIPS_A_PANEL * COLS; ++i) {
    const int first = Form::column(i / COLS, i % COLS);
    if (first <= column && column < first + VW) s = i / COLS, c = i % COLS;
  }
  const int lane = column - Form::column(s, c);
  typename Form::Reader reader(panel, s);
  const auto one = [&] {
    vf weight[COLS];
    float lanes[COLS * VW];
    reader.next(weight);
#pragma GCC unroll 4
    for (int i = 0; i < COLS; ++i) store(lanes + i * VW, weight[i]);
    *out++ = lanes[c * VW + lane];
  };
  for (int64_t k = 0; k < K; k += Form::K_BLOCK) {
    reader.begin();
    if constexpr (Form::K_BLOCK == 1) {
      one();
    } else {
      for (int i = 0; i < Form::K_BLOCK; i += 8) {
        reader.eight();
        for (int j = 0; j < 8; ++j) one();
      }
    }
  }
}

// out[M, N] for the panels [begin, end).
template <class Form>
void linear_panels(const float* x, int64_t M, int64_t K, const char* packed, const float* bias, float* out, int64_t N,
                   int64_t begin, int64_t end) {
  static thread_local std::vector<float> wide;
  constexpr bool narrow = !std::is_same_v<Form, Float32>;
  const bool widened = narrow && M > Form::DIRECT;
  const int most = widened ? MAX_ROWS : Form::ROWS;
  const int64_t bytes = K / Form::K_BLOCK * Form::BYTES, blocks = (M + most - 1) / most;
  if (widened) wide.resize(K * PANEL);
  float padded_bias[PANEL];
  for (int64_t p = begin; p < end; ++p) {
    const char* w = packed + p * bytes;
    const int64_t first = p * PANEL;
    const int n = int(std::min<int64_t>(PANEL, N - first));
    Target to{bias ? bias + first : nullptr, nullptr, N, n, w + PREFETCH, Form::BYTES / Form::K_BLOCK};
    if (bias && n < PANEL) {
      std::memset(padded_bias, 0, sizeof(padded_bias));
      std::memcpy(padded_bias, to.bias, n * sizeof(float));
      to.bias = padded_bias;
    }
    if (widened) widen<Form>(w, K, wide.data(), w + PREFETCH);
    const bool shared = blocks == 2 && p + 1 < end && bytes <= NEXT_PANEL;
    for (int64_t i = 0; i < blocks; ++i) {  // rows in blocks of nearly equal size, the panel stays in L2
      const int64_t m0 = M * i / blocks, m1 = M * (i + 1) / blocks;
      to.out = out + m0 * N + first;
      if (shared) to.ahead = w + bytes + i * (bytes / 2), to.step = bytes / 2 / K;
      const int rows = int(m1 - m0), step = widened ? together<Float32>(rows) : together<Form>(rows);
      const Strip run = widened ? float32_strip(rows) : STRIPS<Form>[rows];
      const char* panel = widened ? reinterpret_cast<const char*>(wide.data()) : w;
      for (int s = 0; s < STRIPS_A_PANEL; s += step)
        if (Form::column(s, 0) < n) run(x + m0 * K, K, panel, K, s, to);
    }
  }
}

}  // namespace treespec
